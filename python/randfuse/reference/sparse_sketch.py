"""Reference of the sparse sketches: `nnz` entries ±1/√nnz a column, one in each of `nnz` blocks of rows.

K keys are K independent operators. All functions mean the rows [row_begin, row_end) of d and the columns from
`col_offset` on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import streams


def sparse_sketch_entries(key: Tensor, d: int, nnz: int, col_offset: int, cols: int) -> tuple[Tensor, Tensor]:
    """Rows (K, nnz, cols), int64, and signs ±1, int8, of the nonzeros."""
    t = torch.arange(nnz + 1, device=key.device)
    first = t * d // nnz
    word = streams.long_lanes(key[:, None, None], t[:-1, None], col_offset, cols, op=streams.SKETCH_INDEX, width=32)
    rows = first[:-1, None] + ((word >> 1) * first.diff()[:, None] >> 31)
    return rows, (1 - 2 * (word & 1)).to(torch.int8)


def sparse_sketch(a: Tensor, key: Tensor, d: int, nnz: int, row_begin: int, row_end: int, col_offset: int) -> Tensor:
    """a (m, n) -> (K, rows, n), float64 of float64, else float32."""
    rows, signs = sparse_sketch_entries(key, d, nnz, col_offset, a.shape[0])
    wide = a.to(streams.sum_dtype(a))
    terms = (signs.unsqueeze(-1) * wide).flatten(1, 2)  # (K, nnz * m, n)
    index = rows.flatten(1).unsqueeze(-1).expand(terms.shape)
    y = torch.zeros(len(key), d, a.shape[1], dtype=wide.dtype, device=a.device).scatter_add(1, index, terms)
    return y[:, row_begin:row_end] * nnz**-0.5


def csr_sketch(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    cols: int,
    key: Tensor,
    d: int,
    nnz: int,
    row_begin: int,
    row_end: int,
    col_offset: int,
) -> Tensor:
    """The same of a sparse matrix (m, cols) in compressed rows."""
    row = torch.arange(len(crow) - 1, device=crow.device).repeat_interleave(crow.diff())
    a = values.new_zeros(len(crow) - 1, cols).index_put((row, col), values)
    return sparse_sketch(a, key, d, nnz, row_begin, row_end, col_offset)


def sparse_sketch_adjoint(
    y: Tensor, key: Tensor, d: int, nnz: int, row_begin: int, row_end: int, col_offset: int, cols: int
) -> Tensor:
    """y (K, rows, n) -> the sum over k of Sₖᵀ yₖ, (cols, n)."""
    rows, signs = sparse_sketch_entries(key, d, nnz, col_offset, cols)
    wide = y.to(streams.sum_dtype(y))
    padded = torch.nn.functional.pad(wide, (0, 0, row_begin, d - row_end))
    index = rows.flatten(1).unsqueeze(-1).expand(-1, -1, y.shape[2])
    terms = padded.gather(1, index).unflatten(1, (nnz, cols)) * signs.unsqueeze(-1)
    return terms.sum((0, 1)) * nnz**-0.5
