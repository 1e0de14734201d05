"""Reference of `multi_sample_scale`: x times the mean of M masks, drawn as one Binomial count."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from . import streams


def multi_sample_count(
    key: Tensor, shape: list[int], thresholds: list[int] | Tensor, row_offset: int, col_offset: int
) -> Tensor:
    """How many of the masks keep each element: (rows, cols), int64, on the key's device."""
    keys, rows = streams.row_keys(key, shape[0], row_offset)
    cols = torch.arange(col_offset, col_offset + shape[1], device=key.device)
    op, rounds = streams.MULTI_SAMPLE_COUNT, streams.WORD_ROUNDS
    lane = streams.lanes(keys, rows, cols, op=op, width=32, rounds=rounds)
    return torch.stack([lane >= t for t in thresholds]).sum(0)


def multi_sample_scale(
    x: Tensor, key: Tensor, num_samples: int, p: float, p_tensor: Tensor | None, row_offset: int, col_offset: int
) -> Tensor:
    """x (…, cols); the count is scaled in float32 (float64 for float64) and the product rounded once."""
    t = streams.threshold(p if p_tensor is None else p_tensor.to(x.device))
    thresholds = streams.count_thresholds(t, num_samples)
    count = multi_sample_count(key, list(_checks.rows_cols(x.shape)), thresholds, row_offset, col_offset)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    scale = torch.as_tensor(streams.count_scale(thresholds), dtype=wide.dtype, device=x.device)
    count = count.reshape(x.shape)
    return torch.where(count > 0, wide * (count * scale), 0).to(x.dtype)
