"""Reference of `dropconnect_linear`: y = x D(W)ᵀ + b, D masking by the stream of weights."""

from __future__ import annotations

from torch import Tensor

from . import streams
from .dropout import dropout
from .dropout_linear import _wide


def dropconnect_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    row_offset: int,
    col_offset: int,
) -> Tensor:
    """x (…, K), weight (N, K), bias (N,) -> (…, N)."""
    xw, ww = _wide(x, weight)
    y = xw @ dropout(ww, key, p, p_tensor, streams.WEIGHT_MASK, 0, row_offset, col_offset).T
    return (y if bias is None else y + bias).to(x.dtype)
