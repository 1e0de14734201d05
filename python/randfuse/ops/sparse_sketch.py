"""Sparse sketches of a matrix: what `randfuse.sketch.CountSketch` and `SJLT` are made of, and their derivatives.

`benchmarks/sketch.py` measures it.

The ops take K keys and sketch K times in one read. Sketch and adjoint are linear and each other's derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backends import call
from .._registry import rules
from ..reference import streams

# Both return float32 of every dtype but float64: what an SJLT adds up must not be rounded on the way.


def sparse_sketch(a: Tensor, key: Tensor, d: int, nnz: int, rows: tuple[int, int], col_offset: int = 0) -> Tensor:
    """Rows `rows` of S_k a for each key: a (m, n), dense or CSR, key (K,) -> (K, rows, n).

    The arguments have been checked by `randfuse.sketch`, which is the public way to here.

    >>> a, key = torch.ones(100, 3), torch.tensor([1, 2])
    >>> whole = sparse_sketch(a, key, 8, 2, (0, 8))
    >>> torch.equal(sparse_sketch(a, key, 8, 2, (3, 6)), whole[:, 3:6])
    True
    """
    if a.layout == torch.sparse_csr:
        csr = a.values(), a.crow_indices().long(), a.col_indices().long()
        return call("csr_sketch", *csr, a.shape[1], key, d, nnz, *rows, col_offset)
    return call("sparse_sketch", a, key, d, nnz, *rows, col_offset)


def sparse_sketch_adjoint(
    y: Tensor, key: Tensor, d: int, nnz: int, rows: tuple[int, int], cols: int, col_offset: int = 0
) -> Tensor:
    """The sum over k of S_kᵀ y_k: y (K, rows, n) -> (cols, n)."""
    return call("sparse_sketch_adjoint", y, key, d, nnz, *rows, col_offset, cols)


def sparse_sketch_entries(key: Tensor, d: int, nnz: int, col_offset: int, cols: int) -> tuple[Tensor, Tensor]:
    """Rows (int64) and signs (int8) of the nonzeros, (K, nnz, cols); each is divided by √nnz."""
    return call("sparse_sketch_entries", key, d, nnz, col_offset, cols)


def _fake(a: Tensor, key: Tensor, d: int, nnz: int, row_begin: int, row_end: int, col_offset: int) -> Tensor:
    return a.new_empty((key.shape[0], row_end - row_begin, a.shape[1]), dtype=streams.sum_dtype(a))


def _csr_fake(
    values: Tensor, crow: Tensor, col: Tensor, cols: int, key: Tensor, d: int, nnz: int, begin: int, end: int, _: int
) -> Tensor:
    return values.new_empty((key.shape[0], end - begin, cols), dtype=streams.sum_dtype(values))


def _adjoint_fake(y: Tensor, key: Tensor, *place: int) -> Tensor:
    return y.new_empty((place[-1], y.shape[2]), dtype=streams.sum_dtype(y))


def _entries_fake(key: Tensor, d: int, nnz: int, col_offset: int, cols: int) -> tuple[Tensor, Tensor]:
    rows = key.new_empty((key.shape[0], nnz, cols))
    return rows, rows.new_empty(rows.shape, dtype=torch.int8)


# Rules of a linear map `name`(x, key, …, col_offset) and of its adjoint, which also takes the length of x: each is the
# other's derivative, and nothing but the keys is saved.


def linear(name: str) -> dict[str, Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (key,) = ctx.saved_tensors
        grad = call(f"{name}_adjoint", grad, key, *ctx.place, ctx.length)
        return grad.to(ctx.dtype), None, *[None] * len(ctx.place)

    return {"setup_context": _setup_context, "backward": backward, "vmap": _batched(name, 2)}


def linear_adjoint(name: str) -> dict[str, Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (key,) = ctx.saved_tensors
        return call(name, grad, key, *ctx.place[:-1]).to(ctx.dtype), None, *[None] * len(ctx.place)

    return {"setup_context": _setup_context, "backward": backward, "vmap": _batched(f"{name}_adjoint", 1)}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, key, *ctx.place = inputs
    ctx.save_for_backward(key)
    ctx.dtype, ctx.length = x.dtype, x.shape[0]


def _batched(name: str, dim: int) -> Any:
    """A batch of operands under shared keys is more columns; keys of a batch are used one by one."""

    def rule(info: Any, in_dims: tuple[Any, ...], x: Tensor, key: Tensor, *place: Any) -> Any:
        if in_dims[1] is not None:
            xs = [x] * info.batch_size if in_dims[0] is None else x.unbind(in_dims[0])
            return torch.stack([call(name, a, k, *place) for a, k in zip(xs, key.unbind(in_dims[1]), strict=True)]), 0
        x = x.movedim(in_dims[0], -2)  # (…, batch, n)
        return call(name, x.flatten(-2), key, *place).unflatten(-1, x.shape[-2:]), dim

    return rule


rules("sparse_sketch", _fake, **linear("sparse_sketch"))
rules("sparse_sketch_adjoint", _adjoint_fake, **linear_adjoint("sparse_sketch"))
rules("csr_sketch", _csr_fake)
rules("sparse_sketch_entries", _entries_fake)
