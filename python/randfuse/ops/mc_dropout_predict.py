"""`mc_dropout_predict`: what a classifier under Monte-Carlo dropout believes, and how sure it is.

Composed of `multi_sample_linear` and torch, so it has no reference, binding or kernel of its own, and no case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._autocast import autocast
from .dropout_linear import linear_arguments
from .multi_sample_linear import multi_sample_linear, samples, settle

CHUNK = 2**20  # logits that exist at a time, if that leaves a row


class Prediction(NamedTuple):
    mean_probs: Tensor
    entropy: Tensor
    mutual_information: Tensor


def mc_dropout_predict(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    num_samples: int = 32,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Prediction:
    """Mean class probabilities over M dropout masks of a linear head's input, and two measures of doubt, in nats.

    Equivalent to: ``torch.stack([F.linear(F.dropout(x, p), weight, bias).softmax(-1) for _ in range(num_samples)])``,
    the mean of that, the entropy of the mean, and this minus the mean entropy of the samples.

    Works through the rows in pieces of about 2**20 logits, so that memory does not grow with M times the rows; under
    `torch.compile` in one piece, since the graph would hold each piece, and be another for each number of rows. The
    answer has no gradient.

    Args:
        x: (…, D), float32, float16, bfloat16 or (on the CPU) float64; under autocast it is cast like in `F.linear`.
        weight: (C, D).
        bias, p, key, generator, row_offset, col_offset: as in `multi_sample_linear`, whose samples it takes.
        num_samples: M.

    Returns:
        Named tuple, float32 (float64 for float64): mean_probs (…, C); entropy (…) of the mean: all doubt; and
        mutual_information (…) of class and mask, never negative: the doubt that more data could remove.

    Raises:
        TypeError, ValueError: as `multi_sample_linear`.

    Gal, Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016; Houlsby et al., "Bayesian Active Learning for
    Classification and Preference Learning", 2011.

    >>> p = mc_dropout_predict(torch.ones(2, 4), torch.zeros(3, 4))
    >>> torch.allclose(p.mean_probs, torch.full((2, 3), 1 / 3)), p.mutual_information.tolist()
    (True, [0.0, 0.0])
    """
    op = "mc_dropout_predict"
    _checks.float_tensor(op, "x", x)
    x, weight, bias = autocast(x, weight, bias)
    linear_arguments(op, x, weight, bias)
    samples(op, num_samples)
    key, *_ = settle(op, x, p, num_samples, key, generator, row_offset, col_offset)
    flat, most = _checks.matrix(x), max(CHUNK // max(num_samples * weight.shape[0], 1), 1)
    whole = [(slice(None), key, row_offset)]
    with torch.no_grad():
        parts = []
        for part, keys, row in (
            whole if torch.compiler.is_compiling() else _chunks(flat.shape[0], key, most, row_offset)
        ):
            logits = multi_sample_linear(
                flat[part], weight, bias, p, num_samples, key=keys, row_offset=row, col_offset=col_offset
            )
            parts.append(_predict(logits))
    mean, entropy, information = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    shape = x.shape[:-1]
    return Prediction(mean.reshape(*shape, weight.shape[0]), entropy.reshape(shape), information.reshape(shape))


def _chunks(rows: int, key: Tensor, most: int, row_offset: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Slices of at most `most` rows (at least one), with the keys and the row offset that they have in the whole.

    A slice is a number of whole runs of rows that share a key, or a part of one run.
    """
    run = rows // key.numel() if key.dim() else rows
    if run == 0:
        yield slice(0, 0), key, row_offset
    elif run > most:
        for start in range(0, rows, run):
            of_run = key[start // run] if key.dim() else key
            for i in range(0, run, most):
                yield slice(start + i, start + min(i + most, run)), of_run, row_offset + i
    else:
        runs = most // run
        for g in range(0, rows // run, runs):
            keys = key[g : g + runs] if key.dim() else key
            yield slice(g * run, min((g + runs) * run, rows)), keys, row_offset


def _predict(logits: Tensor) -> Prediction:
    """Of (M, rows, C), in the type of sums."""
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    mean = log_q.exp().mean(0)
    entropy = torch.special.entr(mean).sum(-1)
    within = torch.special.entr(log_q.exp()).sum(-1).mean(0)
    return Prediction(mean, entropy, (entropy - within).clamp(min=0))
