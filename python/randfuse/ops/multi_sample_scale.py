"""`multi_sample_scale` (x times the mean of M masks, one draw an element) and the linear layer that is fed with it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from .._backends import call
from .._registry import rules
from .dropout import batch_keys, refuse_batched_p

MOST_SAMPLES = 128  # entries of the threshold table that every kernel has room for


def multi_sample_scale(
    x: Tensor, key: Tensor, num_samples: int, p: float, p_tensor: Tensor | None, row_offset: int, col_offset: int
) -> Tensor:
    """x times the mean of `num_samples` independent dropout masks with their scale, as one Binomial count.

    Equivalent to: ``torch.stack([F.dropout(x, p) for _ in range(num_samples)]).mean(0)``, in law.

    The core of `multi_sample_linear(reduce="mean")`, which has checked the arguments. Linear and self-adjoint.

    >>> x = torch.ones(2, 4)
    >>> y = multi_sample_scale(x, randfuse.key(0), 4, 0.5, None, 0, 0)
    >>> set((y * 2).flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    True
    """
    return call("multi_sample_scale", x, key, num_samples, p, p_tensor, row_offset, col_offset)


class MeanLinear(torch.autograd.Function):
    """F.linear(multi_sample_scale(x), weight, bias) that keeps x and not its scaled copy: backward draws again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, key: Tensor, *stream: Any) -> Tensor:
        return F.linear(multi_sample_scale(x, key, *stream), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, key, num_samples, p, p_tensor, *place = inputs
        need_x, need_weight, *_ = ctx.needs_input_grad
        saved = x if need_weight else None, weight if need_x else None  # of a frozen weight, x need not live on
        ctx.save_for_backward(*saved, key, p_tensor)
        ctx.num_samples, ctx.p, ctx.place = num_samples, p, place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, key, p_tensor = ctx.saved_tensors
        stream = key, ctx.num_samples, ctx.p, p_tensor, *ctx.place
        dx = multi_sample_scale(grad @ weight, *stream) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = _checks.matrix(grad).mT @ _checks.matrix(multi_sample_scale(x, *stream))
        db = _checks.matrix(grad).sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db, *[None] * 6


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, whatever the strides of x


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, key, num_samples, p, p_tensor, *place = inputs
    ctx.save_for_backward(key, p_tensor)
    ctx.num_samples, ctx.p, ctx.place = num_samples, p, place


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    key, p_tensor = ctx.saved_tensors
    return multi_sample_scale(grad, key, ctx.num_samples, ctx.p, p_tensor, *ctx.place), *[None] * 6


def _vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, key: Tensor, *rest: Any) -> Any:
    refuse_batched_p("multi_sample_scale", in_dims[4])
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    rows, cols = _checks.rows_cols(x.shape[1:])
    flat = x.reshape(info.batch_size * rows, cols)
    return call("multi_sample_scale", flat, batch_keys(key, in_dims[1], info.batch_size), *rest).reshape(x.shape), 0


rules("multi_sample_scale", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
