"""CountSketch and SJLT: a few ±1 a column. One read of the data, a few additions an element, CSR input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.sparse_sketch import sparse_sketch, sparse_sketch_adjoint, sparse_sketch_entries
from .operator import Operator


class SJLT(Operator):
    """Sparse Johnson–Lindenstrauss transform: `nnz` entries ±1/√nnz a column, one in each of nnz blocks of rows.

    Var‖Sx‖² = (2/d)(‖x‖⁴ − Σxᵢ⁴) where nnz divides d, whatever nnz: more nonzeros buy tails, not variance.

    Args:
        d, m: rows and columns; m < 2**62, since nothing is stored.
        key: int64 () (see `randfuse.key`); None draws one from `generator` or torch's default generator.
        nnz: nonzeros a column, at most d.

    Kane, Nelson, "Sparser Johnson–Lindenstrauss transforms", J. ACM 2014 (the block construction).

    >>> S = SJLT(16, 1000, key=randfuse.key(0))
    >>> A = torch.ones(1000, 3)
    >>> torch.allclose(S @ A, S.to_dense() @ A, atol=1e-4)
    True
    """

    takes_csr = True

    def __init__(
        self, d: int, m: int, *, key: Tensor | None = None, generator: torch.Generator | None = None, nnz: int = 4
    ) -> None:
        super().__init__(d, m, key=key, generator=generator)
        if isinstance(nnz, bool) or not isinstance(nnz, int):
            raise TypeError(f"{self.name}: nnz must be an int, got {type(nnz).__name__}")
        if not 1 <= nnz <= min(d, 1024):
            raise ValueError(f"{self.name}: nnz must be in [1, min(d, 1024)], got {nnz}")
        self.nnz = nnz

    def _sketch(self, a: Tensor, key: Tensor) -> Tensor:
        return sparse_sketch(a, key, self.d, self.nnz, self.rows, self.cols[0])

    def _adjoint(self, y: Tensor, key: Tensor) -> Tensor:
        return sparse_sketch_adjoint(y, key, self.d, self.nnz, self.rows, self.shape[1], self.cols[0])

    def entries(self) -> tuple[Tensor, Tensor]:
        """Rows in the whole S (int64) and signs (int8) of the nonzeros of the block's columns, (nnz, cols)."""
        rows, signs = sparse_sketch_entries(self.key.reshape(1), self.d, self.nnz, self.cols[0], self.shape[1])
        return rows[0], signs[0]

    def to_dense(self) -> Tensor:
        rows, signs = self.entries()
        dense = torch.zeros(self.d, self.shape[1], device=self.key.device)
        return dense.scatter_(0, rows, signs.float() * self.nnz**-0.5)[slice(*self.rows)]


class CountSketch(SJLT):
    """One ±1 a column, in a random row: the SJLT with one nonzero. Var‖Sx‖² = (2/d)(‖x‖⁴ − Σxᵢ⁴).

    Arguments as in `SJLT`. Charikar, Chen, Farach-Colton 2002; Clarkson, Woodruff, STOC 2013.

    >>> S = CountSketch(16, 2**40, key=randfuse.key(0))[:, 2**35 : 2**35 + 100]
    >>> (S @ torch.ones(100)).shape
    torch.Size([16])
    """

    def __init__(self, d: int, m: int, *, key: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(d, m, key=key, generator=generator, nnz=1)
