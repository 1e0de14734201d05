"""`dropout_linear`: F.linear of a dropped input, without a stored mask or a saved dropped copy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, keys
from .._autocast import autocast
from .._backends import call, rate
from .._registry import rules
from ..reference import streams
from .block_dropout_linear import BLOCK_SIZES, ROWS, block_dropout_linear
from .column_dropout_linear import column_dropout_linear
from .dropout import batch_keys, refuse_batched_p


def dropout_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    granularity: str = "element",
    block_size: int = 128,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Linear layer of a dropped input; the mask is consumed by the matrix product and regenerated in backward.

    Equivalent to: ``F.linear(dropout(x, p, key=key), weight, bias)``

    What backward keeps is x, weight and the key: no mask, no dropped copy of x. Differentiable any number of times.

    The other granularities drop more than an element at once and skip the work, forward and backward:

    * "column": exactly k = max(1, round((1 − p)·K)) columns of x stay, the same for all rows, any k of them alike. The
      scale is K/k, so the effective p is 1 − k/K and the mean is exact. Backward keeps the k columns of x and weight.
    * "block": of the n = ⌈K/block_size⌉ blocks of columns each 256 rows keep k of their own. k is ⌊(1 − p)·n⌋ or
      ⌈(1 − p)·n⌉, drawn so that E[k] = (1 − p)·n to within 2⁻³³, and the scale is 1/(1 − p), exactly that of this law.
      At a fixed k, with y_j the contributions of the n blocks to an output and p = 1 − k/n, its variance is
      p/(1−p) · n/(n−1) · [Σy² − (Σy)²/n]: less than that of independent blocks where the y_j have a mean.

    p = 0.9 by columns is the "very large dropout" of Zhang & Bottou, arXiv:2403.00946, at a tenth of the work.

    Args:
        x: (…, K), float32, float16, bfloat16 or (on the CPU) float64; under autocast it is cast like in `F.linear`.
        weight: (N, K).
        bias: (N,) or None.
        p, training, key, generator: as in `dropout`; the mask is ``dropout_mask((rows, K), p, key=key)``.
            The other granularities need a float p, and "column" a key ().
        granularity: "element", "column" or "block".
        block_size: columns of a block, 32, 64 or 128; only "block" reads it.
        row_offset, col_offset: place of x in a larger (rows, K) matrix, in elements. The other granularities choose
            among all columns at once: col_offset must be 0. "block" needs row_offset in multiples of 256; with
            "column" all rows share a choice, whatever their offset.

    Returns:
        (…, N), of the dtype of x.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, probability, key or offset, named in the message.

    >>> x, w = torch.ones(2, 4), torch.eye(4)
    >>> torch.equal(dropout_linear(x, w, p=0.5, key=randfuse.key(0)), randfuse.dropout(x, 0.5, key=randfuse.key(0)))
    True
    """
    op = "dropout_linear"
    _checks.float_tensor(op, "x", x)
    x, weight, bias = autocast(x, weight, bias)
    linear_arguments(op, x, weight, bias)
    _checks.probability(op, p, x.device)
    rows, cols = _checks.rows_cols(x.shape)
    _checks.stream_range(op, rows, cols, row_offset, col_offset)
    keys.check(op, key, generator, rows, x.device)
    check_granularity(op, granularity, p, block_size)
    if granularity != "element":
        _structured_place(op, granularity, key, row_offset, col_offset)
    if not training or (not isinstance(p, Tensor) and p == 0):
        return F.linear(x, weight, bias)
    key = keys.resolve(key, generator, x.device)
    if granularity == "column":
        return column_dropout_linear(x, weight, bias, float(p), key)
    if granularity == "block":
        return block_dropout_linear(x, weight, bias, float(p), key, row_offset, block_size)
    return call(op, x, weight, bias, key, *rate(p), row_offset, col_offset)


def check_granularity(op: str, granularity: str, p: float | Tensor, block_size: int) -> None:
    """The granularity, and what it asks of its companions; also for layers."""
    if granularity not in ("element", "column", "block"):
        raise ValueError(f"{op}: granularity must be 'element', 'column' or 'block', got {granularity!r}")
    if granularity != "element" and isinstance(p, Tensor):
        raise TypeError(f"{op}: p must be a float for granularity {granularity!r}, whose sizes it sets, got a Tensor")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{op}: block_size must be 32, 64 or 128, got {block_size}")


def _structured_place(op: str, granularity: str, key: Tensor | None, row_offset: int, col_offset: int) -> None:
    if col_offset != 0:
        raise ValueError(f"{op}: col_offset must be 0 for granularity {granularity!r}, got {col_offset}")
    if granularity == "block" and row_offset % ROWS:
        raise ValueError(f"{op}: row_offset must be a multiple of {ROWS} for granularity 'block', got {row_offset}")
    if granularity == "column" and key is not None and key.dim() != 0:
        raise ValueError(f"{op}: key must have shape () for granularity 'column' (or use vmap), got {tuple(key.shape)}")


def linear_arguments(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x (…, K), weight (N, K) and bias (N,) of one dtype on one device."""
    _checks.float_tensor(op, "weight", weight, like=x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got 0")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: weight must have shape (N, K={x.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None:
        _checks.float_tensor(op, "bias", bias, like=x)
        _checks.shape(op, "bias", bias, (weight.shape[0],), "(N,)")


# The three products y = D(x) Wᵀ, dgrad = D(g W) and wgrad = gᵀ D(x) are bilinear and self-adjoint in D, so the
# derivative of each consists of the other two: differentiation of any order stays inside this set.


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _dgrad_fake(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _wgrad_fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((grad.shape[-1], x.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, key, p, p_tensor, row_offset, col_offset = inputs
    need_a, need_b, *_ = ctx.needs_input_grad
    saved = operands[0] if need_b else None, operands[1] if need_a else None  # of a frozen weight, x need not live on
    ctx.save_for_backward(*saved, key, p_tensor)
    ctx.p, ctx.offsets = p, (row_offset, col_offset)


def _saved(ctx: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    a, b, key, p_tensor = ctx.saved_tensors
    return a, b, (key, ctx.p, p_tensor, *ctx.offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, stream = _saved(ctx)
    dx = call("dropout_linear_dgrad", grad, weight, *stream) if ctx.needs_input_grad[0] else None
    dw = call("dropout_linear_wgrad", grad, x, *stream) if ctx.needs_input_grad[1] else None
    db = _checks.matrix(grad).sum(0) if ctx.needs_input_grad[2] else None
    return dx, dw, db, *[None] * 5


def _dgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, weight, stream = _saved(ctx)
    dg = call("dropout_linear", grad, weight, None, *stream) if ctx.needs_input_grad[0] else None
    dw = call("dropout_linear_wgrad", g, grad, *stream) if ctx.needs_input_grad[1] else None
    return dg, dw, *[None] * 5


def _wgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, x, stream = _saved(ctx)
    dg = call("dropout_linear", x, grad, None, *stream) if ctx.needs_input_grad[0] else None
    dx = call("dropout_linear_dgrad", g, grad, *stream) if ctx.needs_input_grad[1] else None
    return dg, dx, *[None] * 5


# vmap. Batch elements become runs of rows with keys of their own. A batched weight cannot share one GEMM, so those
# cases mask once and use a batched product.


def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _drop_batch(
    x: Tensor, keys_: Tensor, p: float, p_tensor: Tensor | None, row_offset: int, col_offset: int
) -> Tensor:
    return call("dropout", x, keys_, p, p_tensor, streams.DROPOUT, 0, row_offset, col_offset)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], *_checks.rows_cols(x.shape[1:]))  # (batch, rows, cols)


def _vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None, key: Tensor, *rest: Any
) -> Any:
    refuse_batched_p("dropout_linear", in_dims[5])
    size = info.batch_size
    x, keys_ = _front(x, in_dims[0], size), batch_keys(key, in_dims[3], size)
    if in_dims[1] is None and in_dims[2] is None:
        return call("dropout_linear", x, weight, bias, keys_, *rest), 0
    y = _rows(_drop_batch(x, keys_, *rest)) @ _front(weight, in_dims[1], size).mT
    if bias is not None:
        y = y + _front(bias, in_dims[2], size).unsqueeze(1)
    return y.reshape(*x.shape[:-1], y.shape[-1]), 0


def _dgrad_vmap(info: Any, in_dims: tuple[Any, ...], grad: Tensor, weight: Tensor, key: Tensor, *rest: Any) -> Any:
    refuse_batched_p("dropout_linear", in_dims[4])
    size = info.batch_size
    grad, keys_ = _front(grad, in_dims[0], size), batch_keys(key, in_dims[2], size)
    if in_dims[1] is None:
        return call("dropout_linear_dgrad", grad, weight, keys_, *rest), 0
    dx = _drop_batch(_rows(grad) @ _front(weight, in_dims[1], size), keys_, *rest)
    return dx.reshape(*grad.shape[:-1], dx.shape[-1]), 0


def _wgrad_vmap(info: Any, in_dims: tuple[Any, ...], grad: Tensor, x: Tensor, key: Tensor, *rest: Any) -> Any:
    refuse_batched_p("dropout_linear", in_dims[4])
    size = info.batch_size
    grad, x, keys_ = _front(grad, in_dims[0], size), _front(x, in_dims[1], size), batch_keys(key, in_dims[2], size)
    return _rows(grad).mT @ _rows(_drop_batch(x, keys_, *rest)), 0


rules("dropout_linear", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
rules("dropout_linear_dgrad", _dgrad_fake, setup_context=_setup_context, backward=_dgrad_backward, vmap=_dgrad_vmap)
rules("dropout_linear_wgrad", _wgrad_fake, setup_context=_setup_context, backward=_wgrad_backward, vmap=_wgrad_vmap)
