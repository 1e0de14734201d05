"""Reference of the dense sketches: entries N(0, 1) or ±1, divided by √d in a product.

K keys are K independent operators. All functions mean the rows [row_begin, row_end) of d and the columns from
`col_offset` on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import streams


def _normals(key: Tensor, row: Tensor, first: int, count: int) -> Tensor:
    """Box–Muller in float64: columns c and c + 16 of each 32 share the radius of lane c and the angle of c + 16."""
    start = first // 32 * 32
    word = streams.long_lanes(
        key, row, start, -(-(first + count - start) // 32) * 32, op=streams.SKETCH_NORMAL, width=32
    )
    u, w = word.unflatten(-1, (-1, 2, 16)).unbind(-2)
    radius = (-2 * ((u | 1).float().double() * 2**-32).log()).sqrt()
    quarter = w << 2 & 0xFFFFFFFF
    fraction = (quarter - (quarter >> 31 << 32)).float().double() * 2**-32
    angle = math.pi / 2 * ((w >> 30) + fraction)
    z = torch.stack((radius * angle.cos(), radius * angle.sin()), -2)
    return z.float().flatten(-3)[..., first - start :][..., :count]


def dense_sketch_entries(key: Tensor, family: str, row_begin: int, row_end: int, col_offset: int, cols: int) -> Tensor:
    """(K, rows, cols) float32, unscaled."""
    row = torch.arange(row_begin, row_end, device=key.device).unsqueeze(-1)
    if family == "gaussian":
        return _normals(key[:, None, None], row, col_offset, cols)
    bit = streams.long_lanes(key[:, None, None], row, col_offset, cols, op=streams.SKETCH_SIGN, width=1)
    return 1 - 2 * bit.float()


def dense_sketch(a: Tensor, key: Tensor, family: str, d: int, row_begin: int, row_end: int, col_offset: int) -> Tensor:
    """a (m, n) -> (K, rows, n), float64 of float64, else float32."""
    wide = a.to(streams.sum_dtype(a))
    s = dense_sketch_entries(key, family, row_begin, row_end, col_offset, a.shape[0])
    return s.to(wide.dtype) @ wide * d**-0.5


def dense_sketch_adjoint(
    y: Tensor, key: Tensor, family: str, d: int, row_begin: int, row_end: int, col_offset: int, cols: int
) -> Tensor:
    """y (K, rows, n) -> the sum over k of Sₖᵀ yₖ, (cols, n)."""
    wide = y.to(streams.sum_dtype(y))
    s = dense_sketch_entries(key, family, row_begin, row_end, col_offset, cols)
    return (s.to(wide.dtype).mT @ wide).sum(0) * d**-0.5
