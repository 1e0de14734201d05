"""What every sketching operator is: an implicit d×m matrix S with E[SᵀS] = I, of which blocks can be taken.

A subclass says how a block acts on a matrix, how its adjoint acts, and what its entries are; the rest is here.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .. import _checks, keys

Self = TypeVar("Self", bound="Operator")
MAX_COLUMNS = 2**62


class Operator(ABC):
    """Rows [i0, i1) and columns [j0, j1) of an implicit random matrix, which one key of 8 bytes determines.

    `S @ A`, `A @ S.T`, `S.T @ Y`, `Y @ S` and `S[i0:i1, j0:j1]` are what they are for the matrix `S.to_dense()`, and
    differentiable in A and Y. Results are float32 (float64 of float64 data) whatever the dtype of the data, and do not
    depend on the number of threads. Compiled code writes `S.apply(A)`: torch.compile traces no `@` of such objects.
    """

    def __init__(self, d: int, m: int, *, key: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        self.name = type(self).__name__
        for what, size, most in (("d", d, 2**31 - 1), ("m", m, MAX_COLUMNS)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{self.name}: {what} must be an int, got {type(size).__name__}")
            if not 1 <= size <= most:
                raise ValueError(f"{self.name}: {what} must be in [1, {most}], got {size}")
        device = key.device if isinstance(key, Tensor) else torch.device("cpu")
        keys.check(self.name, key, generator, 1, device)
        self.key = keys.resolve(key, generator, device).reshape(())
        self.d, self.m = d, m
        self.rows, self.cols = (0, d), (0, m)

    takes_csr: ClassVar[bool] = False
    keyed: ClassVar[bool] = True  # type, parameters and key determine all of it

    # --- a block, and how it acts on matrices with keys (K,) for K operators at once --------------------------------

    @abstractmethod
    def _sketch(self, a: Tensor, key: Tensor) -> Tensor:
        """a (cols, n) -> (K, rows, n)."""

    @abstractmethod
    def _adjoint(self, y: Tensor, key: Tensor) -> Tensor:
        """y (K, rows, n) -> the sum of all Sₖᵀ yₖ, (cols, n)."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The block as a float32 matrix: for tests and small problems."""

    # --- as a matrix --------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def __getitem__(self: Self, index: tuple[slice, slice]) -> Self:
        if not isinstance(index, tuple) or len(index) != 2 or not all(isinstance(i, slice) for i in index):
            raise TypeError(f"{self.name}: index must be two slices, got {index!r}")
        block = copy.copy(self)
        block.rows, block.cols = self._range(self.rows, index[0]), self._range(self.cols, index[1])
        return block

    def _range(self, whole: tuple[int, int], part: slice) -> tuple[int, int]:
        start, stop, step = part.indices(whole[1] - whole[0])
        if step != 1:
            raise ValueError(f"{self.name}: index must have step 1, got {step}")
        return whole[0] + start, whole[0] + max(start, stop)

    def __matmul__(self, a: Tensor) -> Tensor:
        return self.apply(a, _row_dim(a))

    def __rmatmul__(self, y: Tensor) -> Tensor:
        return self.adjoint(y, -1)

    def __repr__(self) -> str:
        return f"{self.name}(d={self.d}, m={self.m}, rows={self.rows}, cols={self.cols})"

    # --- along any dimension, in pieces -------------------------------------------------------------------------------

    def apply(
        self,
        a: Tensor,
        dim: int = 0,
        *,
        offset: int | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """alpha · S a + beta · out along `dim`, written to `out` if it is given.

        With `offset`, a holds the coordinates [offset, offset + a.shape[dim]) only, so that shards or pieces of a
        stream add up to the sketch of the whole: ``S.apply(piece, offset=start, beta=1, out=y)``.

        Args:
            a: any floating dtype, shape and strides; two-dimensional CSR where the operator is sparse and dim is 0.
            dim: the dimension that goes from m to d.
            offset: where a begins; None if it is whole.
            alpha, beta: factors of what comes and of what was there.
            out: in the dtype of results; it is overwritten and cannot be differentiated through.
        """
        _operand(self.name, "a", a, self.key)
        dim = _dim(self.name, a, dim)
        block = self
        if offset is not None:
            if not 0 <= offset <= self.shape[1] - a.shape[dim]:
                raise ValueError(
                    f"{self.name}: offset must be in [0, {self.shape[1]} - {a.shape[dim]}], the columns that a leaves, "
                    f"got {offset}"
                )
            block = self[:, offset : offset + a.shape[dim]]
        _length(self.name, "a", a, dim, block.shape[1])
        return _accumulate(self.name, sketch(block, a, dim, self.key.reshape(1)).squeeze(0), alpha, beta, out)

    def adjoint(
        self, y: Tensor, dim: int = 0, *, alpha: float = 1.0, beta: float = 0.0, out: Tensor | None = None
    ) -> Tensor:
        """alpha · Sᵀ y + beta · out along `dim`, which goes from d to m; arguments as in `apply`."""
        _operand(self.name, "y", y, self.key)
        dim = _dim(self.name, y, dim)
        _length(self.name, "y", y, dim, self.shape[0])
        rest = y.movedim(dim, 0)
        x = self._adjoint(rest.reshape(1, self.shape[0], _count(rest)), self.key.reshape(1))
        x = x.reshape(self.shape[1], *rest.shape[1:]).movedim(0, dim)
        return _accumulate(self.name, x, alpha, beta, out)


class Transposed:
    """Sᵀ: `S.T @ Y`, `A @ S.T`, `S.T.T`."""

    def __init__(self, operator: Operator) -> None:
        self.T = operator
        self.shape = operator.shape[::-1]

    def __matmul__(self, y: Tensor) -> Tensor:
        return self.T.adjoint(y, _row_dim(y))

    def __rmatmul__(self, a: Tensor) -> Tensor:
        return self.T.apply(a, -1)

    def __getitem__(self, index: tuple[slice, slice]) -> Transposed:
        return self.T[index[::-1] if isinstance(index, tuple) else index].T

    def to_dense(self) -> Tensor:
        return self.T.to_dense().T


def sketch_many(operators: Sequence[Operator], a: Tensor, dim: int = 0) -> Tensor:
    """The sketches of `a` by K operators that differ in their keys alone, stacked: (K, …), from one read of `a`.

    Equivalent to: ``torch.stack([S.apply(a, dim) for S in operators])``

    >>> operators = [randfuse.sketch.SJLT(8, 100, key=k) for k in randfuse.split(randfuse.key(0), 3)]
    >>> sketch_many(operators, torch.ones(100, 5)).shape
    torch.Size([3, 8, 5])
    """
    if not operators:
        raise ValueError("sketch_many: operators must hold at least one, got none")
    first = operators[0]
    if not first.keyed:
        raise TypeError(f"sketch_many: operators must be determined by their keys, got {first}")
    for other in operators:
        if type(other) is not type(first) or _parameters(other) != _parameters(first):
            raise ValueError(f"sketch_many: operators must differ in their keys alone, got {first} and {other}")
    _operand("sketch_many", "a", a, first.key)
    dim = _dim("sketch_many", a, dim)
    _length("sketch_many", "a", a, dim, first.shape[1])
    return sketch(first, a, dim, torch.stack([operator.key for operator in operators]))


def sketch(block: Operator, a: Tensor, dim: int, key: Tensor) -> Tensor:
    """a (…, cols, …) -> (K, …, rows, …)."""
    if a.layout == torch.sparse_csr:
        if not block.takes_csr:
            raise TypeError(f"{block.name}: a must be dense, got {a.layout}")
        if dim != 0:
            raise ValueError(f"{block.name}: dim must be 0 for a CSR matrix, got {dim}")
        return block._sketch(a, key)
    rest = a.movedim(dim, 0)
    y = block._sketch(rest.reshape(block.shape[1], _count(rest)), key)
    return y.reshape(*y.shape[:2], *rest.shape[1:]).movedim(1, dim + 1)


def _parameters(operator: Operator) -> dict[str, Any]:
    return {name: value for name, value in vars(operator).items() if name != "key"}


def _count(rest: Tensor) -> int:
    return torch.Size(rest.shape[1:]).numel()


def _row_dim(x: Tensor) -> int:
    return -2 if isinstance(x, Tensor) and x.dim() > 1 else 0


def _operand(op: str, name: str, x: Tensor, key: Tensor) -> None:
    _checks.float_tensor(op, name, x, like=key, dtype=False)
    if x.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(f"{op}: {name} must be dense or CSR, got {x.layout}")
    if x.layout == torch.sparse_csr and (x.dim() != 2 or x.requires_grad):
        got = "requires_grad" if x.requires_grad else tuple(x.shape)
        raise ValueError(f"{op}: {name} in CSR must be two-dimensional without gradient, got {got}")


def _dim(op: str, x: Tensor, dim: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{op}: the data must have at least one dimension, got a scalar")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"{op}: dim must be in [{-x.dim()}, {x.dim() - 1}], got {dim}")
    return dim % x.dim()


def _length(op: str, name: str, x: Tensor, dim: int, expected: int) -> None:
    if x.shape[dim] != expected:
        raise ValueError(f"{op}: {name} must have {expected} elements along dim {dim}, got {x.shape[dim]}")


def _accumulate(op: str, y: Tensor, alpha: float, beta: float, out: Tensor | None) -> Tensor:
    if out is None:
        if beta != 0:
            raise ValueError(f"{op}: beta must be 0 without out, got {beta}")
        return y if alpha == 1 else y * alpha
    if out.shape != y.shape or out.dtype != y.dtype or out.device != y.device:
        raise ValueError(
            f"{op}: out must be {y.dtype} {tuple(y.shape)} on {y.device}, got {out.dtype} {tuple(out.shape)} on "
            f"{out.device}"
        )
    if beta == 0:  # whatever was there, NaN too, is gone
        return out.copy_(y if alpha == 1 else y * alpha)
    return (out if beta == 1 else out.mul_(beta)).add_(y, alpha=alpha)
