"""Reference of `dropout` and `dropout_mask`: x * scale where the stream's lane reaches the threshold, else 0."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from . import streams


def dropout_mask(
    key: Tensor,
    shape: list[int],
    p: float,
    p_tensor: Tensor | None,
    op: int,
    sample: int,
    row_offset: int,
    col_offset: int,
) -> Tensor:
    """Bool (rows, cols) on the key's device, True where kept."""
    keys, rows = streams.row_keys(key, shape[0], row_offset)
    cols = torch.arange(col_offset, col_offset + shape[1], device=key.device)
    lane = streams.lanes(keys, rows, cols, op=op, width=16, rounds=streams.MASK_ROUNDS, sample=sample)
    return lane >= streams.threshold(p if p_tensor is None else p_tensor.to(key.device))


def dropout(
    x: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, op: int, sample: int, row_offset: int, col_offset: int
) -> Tensor:
    """x (…, cols); the factor is applied in float32 (float64 for float64) and the product rounded once."""
    mask = dropout_mask(key, list(_checks.rows_cols(x.shape)), p, p_tensor, op, sample, row_offset, col_offset)
    factor = streams.scale(streams.threshold(p if p_tensor is None else p_tensor.to(x.device)))
    wide = x.double() if x.dtype == torch.float64 else x.float()
    factor = torch.as_tensor(factor, dtype=wide.dtype, device=x.device)
    return torch.where(mask.reshape(x.shape), wide * factor, 0).to(x.dtype)
