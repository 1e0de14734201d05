"""Reference of `block_dropout_linear` and of the two products that its derivatives need.

D keeps, for each ROWS rows of a group, the listed blocks of columns and scales them. The three are bilinear and closed
under differentiation:  y = D(x) Wᵀ + b,   dgrad = D(g W),   wgrad = gᵀ D(x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout_linear import _wide

ROWS = 256  # rows that share a choice


def keep_mask(kept: Tensor, rows: int, cols: int, block: int) -> Tensor:
    """kept (…, row blocks, k), ascending in [0, n] of which n is none -> bool (…, rows, cols), True where kept."""
    n = -(-cols // block)
    blocks = torch.zeros(*kept.shape[:-1], n + 1, dtype=torch.bool, device=kept.device)
    blocks = blocks.scatter(-1, kept, torch.ones_like(kept, dtype=torch.bool))[..., :n]
    mask = blocks.repeat_interleave(block, -1)[..., :cols]
    return mask.repeat_interleave(ROWS, -2)[..., :rows, :]


def drop(x: Tensor, kept: Tensor, block: int, scale: float) -> Tensor:
    """x (…, rows, cols), dropped."""
    rows, cols = x.shape[-2:]
    return torch.where(keep_mask(kept, rows, cols, block), x * scale, 0)


def block_dropout_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, block: int, scale: float
) -> Tensor:
    """x (G, M, K), weight (N, K), bias (N,), kept (G, ⌈M/ROWS⌉, k) -> (G, M, N)."""
    xw, ww = _wide(x, weight)
    y = drop(xw, kept, block, scale) @ ww.T
    return (y if bias is None else y + bias).to(x.dtype)


def block_dropout_linear_dgrad(grad: Tensor, weight: Tensor, kept: Tensor, block: int, scale: float) -> Tensor:
    """grad (G, M, N), weight (N, K) -> (G, M, K)."""
    gw, ww = _wide(grad, weight)
    return drop(gw @ ww, kept, block, scale).to(grad.dtype)


def block_dropout_linear_wgrad(grad: Tensor, x: Tensor, kept: Tensor, block: int, scale: float) -> Tensor:
    """grad (G, M, N), x (G, M, K) -> (N, K)."""
    gw, xw = _wide(grad, x)
    return (gw.flatten(0, 1).T @ drop(xw, kept, block, scale).flatten(0, 1)).to(grad.dtype)
