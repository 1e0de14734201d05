"""Reference of `mixout` and `mixout_linear`: a weight mixed with its anchor, W' = A + D(W - A)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import streams
from .dropout import dropout
from .dropout_linear import _wide


def mixout(
    weight: Tensor, anchor: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, row_offset: int, col_offset: int
) -> Tensor:
    """(…, K) twice -> (…, K); where p is 0 the weight itself, which A + (W - A) need not be when rounded."""
    w, a = _wide(weight, anchor)
    mixed = a + dropout(w - a, key, p, p_tensor, streams.WEIGHT_MASK, 0, row_offset, col_offset)
    nothing = torch.as_tensor(streams.threshold(p if p_tensor is None else p_tensor.to(weight.device)) == 0)
    return torch.where(nothing.to(w.device), w, mixed).to(weight.dtype)


def mixout_linear(
    x: Tensor,
    weight: Tensor,
    anchor: Tensor,
    bias: Tensor | None,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    row_offset: int,
    col_offset: int,
) -> Tensor:
    """x (…, K), weight and anchor (N, K), bias (N,) -> (…, N); the weights may be wider than x (autocast)."""
    xw, ww, aw = _wide(x, weight, anchor)
    y = xw @ mixout(ww, aw, key, p, p_tensor, row_offset, col_offset).T.to(xw.dtype)
    return (y if bias is None else y + bias).to(x.dtype)
