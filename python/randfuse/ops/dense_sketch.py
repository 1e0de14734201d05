"""Dense sketches of a matrix: what `randfuse.sketch.Gaussian` and `Rademacher` are made of, and their derivatives.

No CUDA kernel by design: Triton's makes the entries in the tile. `benchmarks/sketch.py` measures it.

As in `sparse_sketch`, the ops take K keys, and sketch and adjoint are each other's derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._backends import call
from .._registry import rules
from ..reference import streams
from .sparse_sketch import linear, linear_adjoint


def dense_sketch(a: Tensor, key: Tensor, family: str, d: int, rows: tuple[int, int], col_offset: int = 0) -> Tensor:
    """Rows `rows` of S_k a for each key: a (m, n), key (K,) -> (K, rows, n).

    The arguments have been checked by `randfuse.sketch`, which is the public way to here.

    >>> a, key = torch.randn(100, 3), torch.tensor([1])
    >>> s = dense_sketch_entries(key, "rademacher", (0, 8), 0, 100)
    >>> torch.allclose(dense_sketch(a, key, "rademacher", 8, (0, 8)), s @ a / 8**0.5, atol=1e-5)
    True
    """
    return call("dense_sketch", a, key, family, d, *rows, col_offset)


def dense_sketch_adjoint(
    y: Tensor, key: Tensor, family: str, d: int, rows: tuple[int, int], cols: int, col_offset: int = 0
) -> Tensor:
    """The sum over k of S_kᵀ y_k: y (K, rows, n) -> (cols, n)."""
    return call("dense_sketch_adjoint", y, key, family, d, *rows, col_offset, cols)


def dense_sketch_entries(key: Tensor, family: str, rows: tuple[int, int], col_offset: int, cols: int) -> Tensor:
    """Entries of mean 0 and variance 1, (K, rows, cols) float32; a sketch divides them by √d."""
    return call("dense_sketch_entries", key, family, *rows, col_offset, cols)


def _fake(a: Tensor, key: Tensor, family: str, d: int, row_begin: int, row_end: int, col_offset: int) -> Tensor:
    return a.new_empty((key.shape[0], row_end - row_begin, a.shape[1]), dtype=streams.sum_dtype(a))


def _adjoint_fake(y: Tensor, key: Tensor, family: str, *place: int) -> Tensor:
    return y.new_empty((place[-1], y.shape[2]), dtype=streams.sum_dtype(y))


def _entries_fake(key: Tensor, family: str, row_begin: int, row_end: int, col_offset: int, cols: int) -> Tensor:
    return key.new_empty((key.shape[0], row_end - row_begin, cols), dtype=torch.float32)


rules("dense_sketch", _fake, **linear("dense_sketch"))
rules("dense_sketch_adjoint", _adjoint_fake, **linear_adjoint("dense_sketch"))
rules("dense_sketch_entries", _entries_fake)
