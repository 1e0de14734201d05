"""`multinomial`: torch.multinomial's signature, exact, for any number of categories.

Composed of the categorical ops, so it has no reference, binding or kernel of its own, and no case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, keys
from .categorical_sample import categorical_race, categorical_sample

CHUNK = 2**20  # categories of one call of the sampler


def multinomial(
    input: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw `num_samples` indices from each row of weights, with or without replacement.

    Equivalent to: ``torch.multinomial(input, num_samples, replacement)`` in law, without its limit of 2**24 categories
    and the float32 sums that never reach the rare ones.

    With replacement a row is read once and each draw costs a tile of 1024 weights. Without, every weight w gets a score
    log w − log E, E a 64-bit exponential, and the largest scores are the draws in their order.

    Args:
        input: (V,) or (N, V) weights, finite and not negative, need not sum to 1; at least one of a row is positive.
            A weight of 0 is never drawn. V below 2**31.
        num_samples: positive; without replacement at most the number of positive weights.
        replacement: whether an index may come twice.
        key: int64 () or (N,); None draws one. A key () stands for `split(key, N)`: rows do not depend on the batch.

    Returns:
        int64 (num_samples,) or (N, num_samples).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, number or weight. Weights are checked where they can be read, on
            the CPU; elsewhere a row without a positive weight gives index 0.

    >>> multinomial(torch.tensor([0.0, 3.0, 0.0, 1.0]), 2).sort().values
    tensor([1, 3])
    >>> multinomial(torch.ones(2, 5), 7, replacement=True).shape
    torch.Size([2, 7])
    """
    op = "multinomial"
    _checks.float_tensor(op, "input", input)
    if input.dim() not in (1, 2) or not 1 <= input.shape[-1] < 2**31:
        raise ValueError(f"{op}: input must have shape (V,) or (N, V) with V in [1, 2**31), got {tuple(input.shape)}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"{op}: num_samples must be a positive int, got {num_samples!r}")
    weights = input.detach().reshape(-1, input.shape[-1])
    n, vocab = weights.shape
    if not replacement and num_samples > vocab:
        raise ValueError(
            f"{op}: num_samples must be at most the {vocab} weights without replacement, got {num_samples}"
        )
    if input.device.type == "cpu":
        _check_weights(op, weights, None if replacement else num_samples)
    keys.check(op, key, generator, n, input.device)
    key = keys.resolve(key, generator, input.device)
    key = keys.fold_in(key, torch.arange(n, device=key.device)) if key.dim() == 0 else key
    if key.shape[0] != n:
        raise ValueError(f"{op}: key must have shape () or (N,) = ({n},), got {tuple(key.shape)}")
    if n == 0:
        return weights.new_empty((0, num_samples), dtype=torch.int64)
    logits = (weights.double() if input.device.type == "cpu" else weights.float()).log()
    draw = _with_replacement if replacement else _without_replacement
    return draw(logits, num_samples, key).reshape(*input.shape[:-1], num_samples)


def _with_replacement(logits: Tensor, num_samples: int, key: Tensor) -> Tensor:
    if logits.shape[1] <= CHUNK:
        return categorical_sample(logits, num_samples=num_samples, key=key)
    # A chunk by its mass, then the index in it; the last key decides the chunks, each chunk has its own.
    chunks = logits.split(CHUNK, 1)
    mass = torch.stack([c.logsumexp(1) for c in chunks], 1)
    place = categorical_sample(mass, num_samples=num_samples, key=keys.fold_in(key, len(chunks)))
    drawn = torch.zeros_like(place)
    for c, chunk in enumerate(chunks):
        here = categorical_sample(chunk, num_samples=num_samples, key=keys.fold_in(key, c)) + c * CHUNK
        drawn = torch.where(place == c, here, drawn)
    return drawn


def _without_replacement(logits: Tensor, num_samples: int, key: Tensor) -> Tensor:
    """Races of one token each: row v of a sequence of V rows under the row's key scores weight v."""
    score = categorical_race(logits.reshape(-1, 1), key=key).score.view_as(logits)
    return score.topk(num_samples, dim=1).indices


def _check_weights(op: str, weights: Tensor, distinct: int | None) -> None:
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"{op}: input must be finite and not negative")
    positive = (weights > 0).sum(1)
    least = 1 if distinct is None else distinct
    if weights.shape[0] and int(positive.min()) < least:
        raise ValueError(f"{op}: input must have at least {least} positive weights a row, got {int(positive.min())}")
