"""Reference of `linear_dropout`: y = residual + D(act(z)), z = x Wᵀ + bias, D masking by the output stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import streams
from .dropout import dropout
from .dropout_linear import _wide

ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def times_derivative(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """grad * act'(z), written with ops that are differentiable themselves; relu selects, as in PyTorch."""
    if activation == "relu":
        return torch.where(z <= 0, 0, grad)
    if activation == "gelu":
        return grad * (0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5)
    if activation == "silu":
        s = torch.sigmoid(z)
        return grad * s * (1 + z * (1 - s))
    return grad


def act_dropout(
    z: Tensor,
    residual: Tensor | None,
    activation: str,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    row_offset: int,
    col_offset: int,
) -> Tensor:
    """z (…, N), residual of its shape -> residual + D(act(z)), of z's shape and dtype."""
    (wide,) = _wide(z)
    y = dropout(ACTIVATIONS[activation](wide), key, p, p_tensor, streams.OUTPUT_DROPOUT, 0, row_offset, col_offset)
    return (y if residual is None else residual + y).to(z.dtype)


def act_dropout_grad(
    grad: Tensor,
    z: Tensor,
    activation: str,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    row_offset: int,
    col_offset: int,
) -> Tensor:
    """d/dz of the above: D(grad * act'(z)); the mask selects last, so a dropped place is 0 whatever act' is there."""
    gw, zw = _wide(grad, z)
    product = times_derivative(gw, zw, activation)
    return dropout(product, key, p, p_tensor, streams.OUTPUT_DROPOUT, 0, row_offset, col_offset).to(grad.dtype)


def linear_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    save_preact: bool,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    row_offset: int,
    col_offset: int,
) -> tuple[Tensor, Tensor]:
    """x (…, K), weight (N, K) -> (y (…, N), z (…, N)); z, which the backward needs, is empty unless asked for."""
    xw, ww = _wide(x, weight)
    z = F.linear(xw, ww, None if bias is None else bias.to(xw.dtype))
    y = act_dropout(z, residual, activation, key, p, p_tensor, row_offset, col_offset).to(x.dtype)
    return y, z.to(x.dtype) if save_preact else x.new_empty(0)
