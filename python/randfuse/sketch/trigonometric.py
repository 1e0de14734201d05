"""SRHT and SRDCT: random signs, an orthogonal transform, d of its rows. Orthogonal-type sketches of dense data."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.dense_sketch import dense_sketch_entries
from ..ops.distinct_rows import distinct_rows
from ..ops.hadamard_transform import hadamard_transform
from ..reference import streams
from .operator import Operator


class _Trigonometric(Operator):
    """S = √(P/d) R F D: D signs, F an orthogonal transform of length P ≥ m, R the choice of d of its rows."""

    substream: ClassVar[int]  # so that SRHT and SRDCT with one key have nothing in common
    length: int

    @abstractmethod
    def _transform(self, x: Tensor, *, inverse: bool) -> Tensor:
        """√(P/d) F x, or Fᵀ, along dim 1 of (K, P, n)."""

    def _check(self) -> None:
        if self.d > self.length:
            raise ValueError(f"{self.name}: d must be at most {self.length}, the transform's length, got {self.d}")

    def _signs(self, key: Tensor) -> Tensor:
        row = 2**32 - 1 - self.substream  # beyond the rows of Rademacher
        return dense_sketch_entries(key, "rademacher", (row, row + 1), self.cols[0], self.shape[1]).mT

    def _kept(self, key: Tensor, n: int) -> Tensor:
        rows = distinct_rows(key, self.substream, self.length, self.d)[:, slice(*self.rows)]
        return rows.unsqueeze(-1).expand(-1, -1, n)

    def _sketch(self, a: Tensor, key: Tensor) -> Tensor:
        x = self._signs(key) * a.to(streams.sum_dtype(a))
        x = torch.nn.functional.pad(x, (0, 0, self.cols[0], self.length - self.cols[1]))
        return self._transform(x, inverse=False).gather(1, self._kept(key, a.shape[1]))

    def _adjoint(self, y: Tensor, key: Tensor) -> Tensor:
        wide = y.to(streams.sum_dtype(y))
        x = wide.new_zeros(y.shape[0], self.length, y.shape[2]).scatter(1, self._kept(key, y.shape[2]), wide)
        return (self._signs(key) * self._transform(x, inverse=True)[:, slice(*self.cols)]).sum(0)

    def to_dense(self) -> Tensor:
        return self._sketch(torch.eye(self.shape[1], device=self.key.device), self.key.reshape(1))[0]


class SRHT(_Trigonometric):
    """Subsampled randomised Hadamard transform √(P/d) R H D, P the power of two from m on, at most 2**24.

    Var‖Sx‖² = (2/d)·(P − d)/(P − 1)·(‖x‖⁴ − Σxᵢ⁴): rows are drawn without replacement, so d = P is an isometry.
    Arguments as in `SJLT`, without nnz; the data are copied to P rows in float32.

    Ailon, Chazelle, "The fast Johnson–Lindenstrauss transform", SIAM J. Computing 2009; Tropp 2011.

    >>> S = SRHT(1024, 1000, key=randfuse.key(0))
    >>> x = torch.randn(1000)
    >>> torch.allclose((S @ x).norm(), x.norm())
    True
    """

    substream = 0

    def __init__(self, d: int, m: int, *, key: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(d, m, key=key, generator=generator)
        if m > 2**24:
            raise ValueError(f"{self.name}: m must be in [1, 2**24], got {m}")
        self.length = 1 << (m - 1).bit_length()
        self._check()

    def _transform(self, x: Tensor, *, inverse: bool) -> Tensor:
        return hadamard_transform(x, self.d**-0.5, 1)


class SRDCT(_Trigonometric):
    """Subsampled randomised cosine transform √(m/d) R C D, C the orthonormal DCT-II: of any length, by `torch.fft`.

    Arguments as in `SJLT`, without nnz. Patil, LeJeune, "Asymptotically free sketched ridge ensembles", ICLR 2024.

    >>> S = SRDCT(100, 100, key=randfuse.key(0))
    >>> x = torch.randn(100)
    >>> torch.allclose(S.T @ (S @ x), x, atol=1e-5)
    True
    """

    substream = 1

    def __init__(self, d: int, m: int, *, key: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(d, m, key=key, generator=generator)
        if m > 2**24:
            raise ValueError(f"{self.name}: m must be in [1, 2**24], got {m}")
        self.length = m
        self._check()

    def _transform(self, x: Tensor, *, inverse: bool) -> Tensor:
        """Makhoul 1980: a DCT of length P is a Fourier transform of the even elements, then the odd ones backwards."""
        p, dtype = self.length, x.dtype
        if x.numel() == 0:  # which the library's transform refuses
            return x
        k = torch.arange(p, device=x.device, dtype=torch.float64)
        weight = torch.full_like(k, math.sqrt(2 / p)).index_fill(0, k[:1].long(), math.sqrt(1 / p))
        turn = torch.polar(weight * math.sqrt(p / self.d), -math.pi * k / (2 * p))
        turn = turn.to(torch.complex128 if dtype == torch.float64 else torch.complex64).unsqueeze(-1)
        place = torch.cat((torch.arange(0, p, 2, device=x.device), torch.arange(1, p, 2, device=x.device).flip(0)))
        if inverse:  # the transpose of each step, last one first
            spectrum = torch.fft.fft(x * turn, dim=1).real
            return torch.zeros_like(spectrum).index_copy(1, place, spectrum)
        return (torch.fft.fft(x[:, place], dim=1) * turn).real
