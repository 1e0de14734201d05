"""`embedding_dropout`: whole rows of an embedding dropped; only the rows looked up are decided about.

Composed of `dropout_mask` and torch's embedding, so it has no reference, binding, kernel or case of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, keys
from .._backends import call, rate
from ..reference import streams

ROWS_A_TOKEN = 32  # rows of a table that the mask's kernel decides about in the time of one token's lane


def embedding_dropout(
    tokens: Tensor,
    weight: Tensor,
    p: float | Tensor = 0.1,
    training: bool = True,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    """Look up tokens in an embedding; each row is dropped with probability p, for all its occurrences in the call.

    Equivalent to: ``F.embedding(tokens, weight * F.dropout(torch.ones(V, 1), p))``, a row's mask being a function of
    (key, token)

    The V×H table is never touched: a decision is one random word for each token of the input, or, where V is less than
    some tens of that, for each row in one call of the mask's kernel: the same decisions, faster. The gradient is that
    of `F.embedding`, dense or sparse. A dropped NaN or inf becomes 0.

    Args:
        tokens: int64 or int32, any shape.
        weight: (V, H), float32, float16, bfloat16 or (on the CPU) float64.
        p: probability of zeroing a row, a float or a 0-d tensor, as in `dropout`.
        training: False is `F.embedding`.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: as in `F.embedding`.
        key: int64 () or (G,); G must divide the number of tokens, and run r of them reads key r, so that sequences may
            have masks of their own. None draws one from `generator` or torch's default generator.
        row_offset: first row of weight in the whole table, for a shard of it.

    Returns:
        (*tokens.shape, H), of the dtype of weight.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, probability, key or offset, named in the message.
        IndexError: a token outside the table, as `F.embedding` says it.

    Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", NIPS 2016;
    Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models", ICLR 2018.

    >>> y = embedding_dropout(torch.tensor([5, 7, 5]), torch.ones(9, 2), 0.5, key=randfuse.key(0))
    >>> torch.equal(y[0], y[2])
    True
    """
    op = "embedding_dropout"
    _checks.float_tensor(op, "weight", weight)
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{op}: tokens must be an int64 or int32 Tensor, got {got}")
    if tokens.device != weight.device:
        raise ValueError(f"{op}: tokens must be on {weight.device}, got {tokens.device}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must have shape (V, H), got {tuple(weight.shape)}")
    _checks.probability(op, p, weight.device)
    _checks.stream_range(op, weight.shape[0], 1, row_offset, 0)
    keys.check(op, key, generator, tokens.numel(), weight.device)
    y = F.embedding(tokens, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if not training or (not isinstance(p, Tensor) and p == 0):
        return y
    key = keys.resolve(key, generator, weight.device)
    threshold = streams.threshold(p.to(weight.device) if isinstance(p, Tensor) else p)
    wide = y if y.dtype == torch.float64 else y.float()
    scaled = wide * torch.as_tensor(streams.scale(threshold), dtype=wide.dtype, device=y.device)
    if key.dim() == 0 and weight.shape[0] <= ROWS_A_TOKEN * tokens.numel():
        rows = call("dropout_mask", key, [weight.shape[0], 1], *rate(p), streams.EMBEDDING_ROW, 0, row_offset, 0)
        kept = F.embedding(tokens, rows)
    else:
        kept = (_lanes(tokens, key, row_offset) >= threshold).unsqueeze(-1)
    return torch.where(kept, scaled, 0).to(y.dtype)


def _lanes(tokens: Tensor, key: Tensor, row_offset: int) -> Tensor:
    """The 16-bit lane of each token: row = its place in the table, column 0, in a stream of its own."""
    run_keys, _ = streams.row_keys(key, tokens.numel())
    rows, first = tokens.reshape(-1).long() + row_offset, torch.zeros(1, dtype=torch.int64, device=tokens.device)
    lanes = streams.lanes(run_keys, rows, first, op=streams.EMBEDDING_ROW, width=16, rounds=streams.MASK_ROUNDS)
    return lanes.reshape(tokens.shape)
