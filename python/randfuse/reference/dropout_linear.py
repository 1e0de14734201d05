"""Reference of `dropout_linear` and of the two products that its derivatives need.

D masks and scales a (rows, K) matrix by the stream of (key, offsets). The three are bilinear and closed under
differentiation:  y = D(x) Wᵀ,   dgrad = D(g W),   wgrad = gᵀ D(x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from . import streams
from .dropout import dropout


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.dtype == torch.float64 else t.float() for t in tensors)


def dropout_linear(
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
    y = dropout(xw, key, p, p_tensor, streams.DROPOUT, 0, row_offset, col_offset) @ ww.T
    return (y if bias is None else y + bias).to(x.dtype)


def dropout_linear_dgrad(
    grad: Tensor, weight: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, row_offset: int, col_offset: int
) -> Tensor:
    """grad (…, N), weight (N, K) -> (…, K)."""
    gw, ww = _wide(grad, weight)
    return dropout(gw @ ww, key, p, p_tensor, streams.DROPOUT, 0, row_offset, col_offset).to(grad.dtype)


def dropout_linear_wgrad(
    grad: Tensor, x: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, row_offset: int, col_offset: int
) -> Tensor:
    """grad (…, N), x (…, K) -> (N, K)."""
    gw, xw = _wide(grad, x)
    dropped = dropout(xw, key, p, p_tensor, streams.DROPOUT, 0, row_offset, col_offset)
    return (_checks.matrix(gw).T @ _checks.matrix(dropped)).to(grad.dtype)
