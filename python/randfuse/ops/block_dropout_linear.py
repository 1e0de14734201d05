"""`block_dropout_linear`: the block granularity of `dropout_linear`; products that skip what is dropped.

No CPU kernel: the library's products of the kept blocks do the work there. No CUDA kernel by design: Triton's skips
blocks.

>>> x, w = torch.ones(2, 256), torch.ones(1, 256)
>>> y = randfuse.dropout_linear(x, w, p=0.5, granularity="block", block_size=64, key=randfuse.key(0))
>>> y.tolist()  # two of four blocks of 64 columns, twice as large, and the same for both rows
[[256.0], [256.0]]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks
from .._backends import call
from .._registry import rules
from ..reference.block_dropout_linear import ROWS, drop
from ..reference.kept_blocks import BLOCKS
from . import kept_blocks

BLOCK_SIZES = (32, 64, 128)


def block_dropout_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, p: float, key: Tensor, row_offset: int, size: int
) -> Tensor:
    """The op on checked arguments of `dropout_linear`: each of its G keys serves a run of rows, a choice each ROWS."""
    groups = key.numel()
    rows, cols = _checks.rows_cols(x.shape)
    matrices = x.reshape(groups, rows // groups, cols)
    n = -(-int(cols) // size)
    kept, coin, scale = kept_blocks.choice(p, n)
    blocks = -(-matrices.shape[1] // ROWS)
    chosen = kept_blocks.draw(key, blocks, n, kept, coin, BLOCKS, row_offset // ROWS)
    y = call("block_dropout_linear", matrices, weight, bias, chosen, size, scale)
    return y.reshape(*x.shape[:-1], weight.shape[0])


# As in dropout_linear: y = D(x) Wᵀ, dgrad = D(g W) and wgrad = gᵀ D(x) are each other's derivatives. What backward
# keeps of the choice are its indices, 8 bytes for each kept block of ROWS x size elements.


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _dgrad_fake(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _wgrad_fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((grad.shape[-1], x.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, *_, kept, block, scale = inputs
    need_a, need_b, *_ = ctx.needs_input_grad
    ctx.save_for_backward(a if need_b else None, b if need_a else None, kept)
    ctx.law = block, scale


def _saved(ctx: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    a, b, kept = ctx.saved_tensors
    return a, b, (kept, *ctx.law)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, choice = _saved(ctx)
    dx = call("block_dropout_linear_dgrad", grad, weight, *choice) if ctx.needs_input_grad[0] else None
    dw = call("block_dropout_linear_wgrad", grad, x, *choice) if ctx.needs_input_grad[1] else None
    db = _checks.matrix(grad).sum(0) if ctx.needs_input_grad[2] else None
    return dx, dw, db, None, None, None


def _dgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, weight, choice = _saved(ctx)
    dg = call("block_dropout_linear", grad, weight, None, *choice) if ctx.needs_input_grad[0] else None
    dw = call("block_dropout_linear_wgrad", g, grad, *choice) if ctx.needs_input_grad[1] else None
    return dg, dw, None, None, None


def _wgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, x, choice = _saved(ctx)
    dg = call("block_dropout_linear", x, grad, None, *choice) if ctx.needs_input_grad[0] else None
    dx = call("block_dropout_linear_dgrad", g, grad, *choice) if ctx.needs_input_grad[1] else None
    return dg, dx, None, None, None


# vmap: batch elements become groups. A batched weight cannot share one product, so those cases drop once and use a
# batched product.


def _front(size: int, in_dims: tuple[Any, ...], *tensors: Tensor | None) -> list[Any]:
    """Tensors with the batch first, expanded where they had none."""
    pairs = zip(tensors, in_dims, strict=False)
    return [t if t is None else t.expand(size, *t.shape) if d is None else t.movedim(d, 0) for t, d in pairs]


def _vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, *law: Any
) -> Any:
    batch = info.batch_size
    xs, ws, bs, choices = _front(batch, in_dims, x, weight, bias, kept)
    if in_dims[1] is None and in_dims[2] is None:
        y = call("block_dropout_linear", xs.flatten(0, 1), weight, bias, choices.flatten(0, 1), *law)
        return y.reshape(*xs.shape[:-1], y.shape[-1]), 0
    y = drop(xs, choices, *law) @ ws.unsqueeze(1).mT
    return y if bs is None else y + bs[:, None, None], 0


def _dgrad_vmap(info: Any, in_dims: tuple[Any, ...], grad: Tensor, weight: Tensor, kept: Tensor, *law: Any) -> Any:
    gs, ws, choices = _front(info.batch_size, in_dims, grad, weight, kept)
    if in_dims[1] is None:
        dx = call("block_dropout_linear_dgrad", gs.flatten(0, 1), weight, choices.flatten(0, 1), *law)
        return dx.reshape(*gs.shape[:-1], dx.shape[-1]), 0
    return drop(gs @ ws.unsqueeze(1), choices, *law), 0


def _wgrad_vmap(info: Any, in_dims: tuple[Any, ...], grad: Tensor, x: Tensor, kept: Tensor, *law: Any) -> Any:
    gs, xs, choices = _front(info.batch_size, in_dims, grad, x, kept)
    return gs.flatten(1, 2).mT @ drop(xs, choices, *law).flatten(1, 2), 0


rules("block_dropout_linear", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
rules(
    "block_dropout_linear_dgrad",
    _dgrad_fake,
    setup_context=_setup_context,
    backward=_dgrad_backward,
    vmap=_dgrad_vmap,
)
rules(
    "block_dropout_linear_wgrad",
    _wgrad_fake,
    setup_context=_setup_context,
    backward=_wgrad_backward,
    vmap=_wgrad_vmap,
)
