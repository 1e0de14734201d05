"""Reference of `hadamard_transform`: log2(n) levels of butterflies."""

from __future__ import annotations

import torch
from torch import Tensor

from . import streams


def hadamard_transform(x: Tensor, scale: float, dim: int) -> Tensor:
    """scale · H x along dim, H[i, j] = (-1)^popcount(i & j); of x's shape and dtype."""
    y, h = x.to(streams.sum_dtype(x)).movedim(dim, -1).contiguous(), 1
    shape = y.shape
    while h < shape[-1]:
        pairs = y.reshape(*shape[:-1], shape[-1] // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y, h = torch.stack((a + b, a - b), -2).reshape(shape), 2 * h
    return (y * scale).movedim(-1, dim).to(x.dtype).contiguous()
