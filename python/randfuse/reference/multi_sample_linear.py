"""Reference of `multi_sample_linear` and of the two products that its derivatives need.

D_m masks and scales a (rows, K) matrix by sub-stream m of (key, offsets). The three are bilinear and closed under
differentiation:  y_m = D_m(x) W_mᵀ,   dgrad = Σ_m D_m(g_m W_m),   wgrad_m = g_mᵀ D_m(x),  with one W for all m (then
wgrad is their sum) or a W_m each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from . import streams
from .dropout import dropout


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.dtype == torch.float64 else t.float() for t in tensors)


def multi_sample_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key: Tensor,
    num_samples: int,
    p: float,
    p_tensor: Tensor | None,
    row_offset: int,
    col_offset: int,
) -> Tensor:
    """x (…, K), weight (N, K) or (M, N, K), bias (N,) or (M, N) -> (M, …, N)."""
    xw, ww = _wide(_checks.matrix(x), weight)
    samples = range(num_samples)
    y = (
        torch.stack([dropout(xw, key, p, p_tensor, streams.DROPOUT, m, row_offset, col_offset) for m in samples])
        @ ww.mT
    )
    if bias is not None:
        y = y + (bias if bias.dim() == 1 else bias.unsqueeze(1))
    return y.to(x.dtype).reshape(num_samples, *x.shape[:-1], weight.shape[-2])


def multi_sample_linear_dgrad(
    grad: Tensor, weight: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, row_offset: int, col_offset: int
) -> Tensor:
    """grad (M, …, N), weight (N, K) or (M, N, K) -> (…, K)."""
    gw, ww = _wide(grad, weight)
    products = gw.reshape(grad.shape[0], *_checks.rows_cols(grad.shape[1:])) @ ww
    place = row_offset, col_offset
    dx = torch.stack([dropout(g, key, p, p_tensor, streams.DROPOUT, m, *place) for m, g in enumerate(products)]).sum(0)
    return dx.to(grad.dtype).reshape(*grad.shape[1:-1], weight.shape[-1])


def multi_sample_linear_wgrad(
    grad: Tensor,
    x: Tensor,
    shared: bool,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    row_offset: int,
    col_offset: int,
) -> Tensor:
    """grad (M, …, N), x (…, K) -> (N, K) if one weight is shared by all samples, else (M, N, K)."""
    gw, xw = _wide(grad, _checks.matrix(x))
    samples = range(grad.shape[0])
    dropped = [dropout(xw, key, p, p_tensor, streams.DROPOUT, m, row_offset, col_offset) for m in samples]
    dw = gw.reshape(grad.shape[0], *_checks.rows_cols(grad.shape[1:])).mT @ torch.stack(dropped)
    return (dw.sum(0) if shared else dw).to(grad.dtype)
