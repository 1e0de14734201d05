"""Reference of `lora_linear` and of the products that its derivatives need.

s = D(x) Aᵀ,  y = x Wᵀ + bias + scaling s Bᵀ,  dgrad = g W + D(ds A),  wgrad = dsᵀ D(x). What has the size of the rank
(s, ds, wgrad) is float32, or float64 beside float64, whatever the dtype of x.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from . import streams
from .dropout import dropout
from .dropout_linear import _wide


def lora_linear_down(
    x: Tensor,
    lora_a: Tensor,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    sample: int,
    row_offset: int,
    col_offset: int,
) -> Tensor:
    """x (…, K), lora_a (r, K) -> s (…, r)."""
    xw, aw = _wide(x, lora_a)
    return dropout(xw, key, p, p_tensor, streams.DROPOUT, sample, row_offset, col_offset) @ aw.to(xw.dtype).T


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    sample: int,
    row_offset: int,
    col_offset: int,
) -> tuple[Tensor, Tensor]:
    """x (…, K), weight (N, K), bias (N,), lora_a (r, K), lora_b (N, r) -> (y (…, N), s (…, r))."""
    s = lora_linear_down(x, lora_a, key, p, p_tensor, sample, row_offset, col_offset)
    xw, ww, bw = _wide(x, weight, lora_b)
    base = F.linear(xw, ww, None if bias is None else bias.to(xw.dtype))
    return (base + scaling * (s @ bw.to(s.dtype).T)).to(x.dtype), s


def lora_linear_dgrad(
    grad: Tensor,
    weight: Tensor,
    ds: Tensor,
    lora_a: Tensor,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    sample: int,
    row_offset: int,
    col_offset: int,
) -> Tensor:
    """grad (…, N), weight (N, K), ds (…, r), lora_a (r, K) -> (…, K)."""
    gw, ww, aw = _wide(grad, weight, lora_a)
    update = dropout(ds @ aw.to(ds.dtype), key, p, p_tensor, streams.DROPOUT, sample, row_offset, col_offset)
    return (gw @ ww + update).to(grad.dtype)


def lora_linear_wgrad(
    ds: Tensor, x: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, sample: int, row_offset: int, col_offset: int
) -> Tensor:
    """ds (…, r), x (…, K) -> (r, K)."""
    (xw,) = _wide(x)
    dropped = dropout(xw, key, p, p_tensor, streams.DROPOUT, sample, row_offset, col_offset)
    return _checks.matrix(ds).T @ _checks.matrix(dropped)
