"""`column_dropout_linear`: the column granularity of `dropout_linear`; one product of the columns that stay.

Composed of `kept_blocks` and the library's product, so it has no reference, binding or kernel of its own.

>>> x, w = torch.ones(2, 10), torch.ones(1, 10)
>>> randfuse.dropout_linear(x, w, p=0.9, granularity="column", key=randfuse.key(0)).tolist()
[[10.0], [10.0]]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.kept_blocks import COLUMNS
from . import kept_blocks


def column_dropout_linear(x: Tensor, weight: Tensor, bias: Tensor | None, p: float, key: Tensor) -> Tensor:
    """The op on checked arguments of `dropout_linear`, key ().

    Work: (1-p) 2 M N K flops each way. Bytes: the kept columns of x and W once more, which is what backward keeps.
    """
    cols = int(x.shape[-1])
    count = kept_columns(p, cols)
    kept = kept_blocks.draw(key, 1, cols, count, 0, COLUMNS).reshape(count)
    scale = cols / count if count else 0.0
    return F.linear(_Take.apply(x, kept) * scale, _Take.apply(weight, kept), bias)


def kept_columns(p: float, cols: int) -> int:
    """How many stay: round((1 − p)·cols), but at least one unless p = 1."""
    return min(cols, max(round((1 - p) * cols), int(p < 1)))


# Each other's adjoint, hence differentiable any number of times. torch's own gather would scatter its gradient by
# atomic additions; the columns are all different, so they can be stored. `kept` is (k,), or
# under vmap (batch, 1, …, 1, k).


def _batched(size: int, in_dims: tuple[Any, ...], x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    x = x.expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[1] is None:
        return x, kept
    kept = kept.movedim(in_dims[1], 0)
    return x, kept.reshape(size, *[1] * (x.dim() - kept.dim()), *kept.shape[1:])


class _Take(torch.autograd.Function):
    """x (…, K) -> its columns (…, k)."""

    @staticmethod
    def forward(x: Tensor, kept: Tensor) -> Tensor:
        return x.gather(-1, kept.expand(*x.shape[:-1], -1))  # index_select takes up to three times as long on the CPU

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, kept = inputs
        ctx.save_for_backward(kept)
        ctx.cols = x.shape[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Put.apply(grad, ctx.saved_tensors[0], ctx.cols), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, kept: Tensor) -> tuple[Tensor, int]:
        return _Take.apply(*_batched(info.batch_size, in_dims, x, kept)), 0


class _Put(torch.autograd.Function):
    """y (…, k) -> (…, cols), zero but in the columns kept."""

    @staticmethod
    def forward(y: Tensor, kept: Tensor, cols: int) -> Tensor:
        out = y.new_zeros((*y.shape[:-1], cols))
        if kept.dim() == 1:
            return out.index_copy_(-1, kept, y)  # scatter takes three times as long in bf16 on the CPU
        return out.scatter_(-1, kept.expand(y.shape), y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Take.apply(grad, ctx.saved_tensors[0]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], y: Tensor, kept: Tensor, cols: int) -> tuple[Tensor, int]:
        return _Put.apply(*_batched(info.batch_size, in_dims, y, kept), cols), 0
