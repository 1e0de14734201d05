"""`mixout_linear`: F.linear with a weight mixed with its anchor, and `mixout`, the mixed weight itself.

No CUDA kernel by design: Triton has it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _autocast, _checks, keys
from .._backends import call, rate
from .._registry import rules
from .dropconnect_linear import batched_linear, drop_weight, weight_arguments
from .dropout import batch_keys, refuse_batched_p
from .dropout_linear import _front, linear_arguments


def mixout(
    weight: Tensor,
    anchor: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Replace each element by its anchor with probability p; the others move away from theirs, so that the mean stays.

    Equivalent to: ``anchor + F.dropout(weight - anchor, p)``, the mask being a function of the key

    One pass: two reads, one write. The gradient of weight is ``m·G/(1 - p)``, that of anchor the rest of G; the factor
    1/(1 - p) is missing in the authors' program. Kept for backward: the key.

    Args:
        weight: (…, K), float32, float16, bfloat16 or (on the CPU) float64; seen as (rows, K), for F.linear (N, K).
        anchor: of the shape, dtype and device of weight: the pretrained weight.
        p: probability of the anchor; p=1 returns it. Otherwise as in `dropout`.
        training: False returns weight.
        key, generator, row_offset, col_offset: as in `dropout`; the mask is that of `dropconnect`.

    Raises:
        TypeError, ValueError: as in `dropout`.

    Lee, Cho and Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models", ICLR 2020.

    >>> w, a = torch.ones(2, 4), torch.zeros(2, 4)
    >>> torch.equal(mixout(w, a, 0.5, key=randfuse.key(0)), randfuse.dropconnect(w, 0.5, key=randfuse.key(0)))
    True
    """
    op = "mixout"
    _checks.float_tensor(op, "weight", weight)
    _anchor_argument(op, weight, anchor)
    if weight_arguments(op, weight, p, training, key, generator, row_offset, col_offset):
        return weight
    key = keys.resolve(key, generator, weight.device)
    return call(op, weight, anchor, key, *rate(p), row_offset, col_offset)


def mixout_linear(
    x: Tensor,
    weight: Tensor,
    anchor_weight: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Linear layer whose weight is mixed with a pretrained one, by one mask for the whole batch.

    Equivalent to: ``F.linear(x, mixout(weight, anchor_weight, p, key=key), bias)``

    What backward keeps is x, weight, anchor_weight and the key; the mixed weight is made again. The bias is not mixed.
    Differentiable any number of times. Under autocast the weights are mixed in their own dtype and rounded once: their
    difference would not survive a rounding of each.

    Args:
        x: (…, K), float32, float16, bfloat16 or (on the CPU) float64; under autocast it is cast like in `F.linear`.
        weight: (N, K).
        anchor_weight: (N, K), the pretrained weight; it gets a gradient if it asks for one.
        bias: (N,) or None.
        p, training, key, generator, row_offset, col_offset: as in `dropconnect_linear`, with p the probability of the
            anchor.

    Returns:
        (…, N), of the dtype of x.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, probability, key or offset, named in the message.

    >>> x, w, anchor = torch.ones(1, 4), torch.ones(3, 4), torch.zeros(3, 4)
    >>> mixout_linear(x, w, anchor, p=1.0)
    tensor([[0., 0., 0.]])
    """
    op = "mixout_linear"
    _checks.float_tensor(op, "x", x)
    _checks.float_tensor(op, "weight", weight)
    _anchor_argument(op, weight, anchor_weight, name="anchor_weight")
    x, cast_weight, bias = _autocast.autocast(x, weight, bias)
    linear_arguments(op, x, cast_weight, bias)
    if weight_arguments(op, weight, p, training, key, generator, row_offset, col_offset):
        return F.linear(x, weight, bias)
    key = keys.resolve(key, generator, x.device)
    return call(op, x, weight, anchor_weight, bias, key, *rate(p), row_offset, col_offset)


def _anchor_argument(op: str, weight: Tensor, anchor: Tensor, name: str = "anchor") -> None:
    _checks.float_tensor(op, name, anchor, like=weight)
    _checks.shape(op, name, anchor, tuple(weight.shape), "of weight")


# A + D(W - A) is linear in both: D(G) is the gradient of W and G - D(G) that of A. The linear layer's derivatives are
# products and these two.


def _fake(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape)


def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, key, p, p_tensor, *offsets = inputs
    ctx.save_for_backward(key, p_tensor)
    ctx.p, ctx.offsets = p, offsets


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    key, p_tensor = ctx.saved_tensors
    return *_shares(grad, (key, ctx.p, p_tensor, *ctx.offsets), ctx.needs_input_grad), *[None] * 5


def _shares(grad: Tensor, stream: tuple[Any, ...], needed: tuple[bool, ...]) -> tuple[Tensor, Tensor | None]:
    """What of the mixed weight's gradient goes to weight and to anchor, which is frozen as a rule."""
    own = drop_weight(grad, *stream)
    return own, grad - own if needed[1] else None


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, anchor, _, key, p, p_tensor, *offsets = inputs
    need_x, need_weight, need_anchor, *_ = ctx.needs_input_grad
    saved = x if need_weight or need_anchor else None, *((weight, anchor) if need_x else (None, None))
    ctx.save_for_backward(*saved, key, p_tensor)
    ctx.p, ctx.offsets, ctx.dtype = p, offsets, weight.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, anchor, key, p_tensor = ctx.saved_tensors
    stream, flat = (key, ctx.p, p_tensor, *ctx.offsets), _checks.matrix(grad)
    need_x, need_weight, need_anchor, need_bias, *_ = ctx.needs_input_grad
    dx = grad @ call("mixout", weight, anchor, *stream).to(grad.dtype) if need_x else None
    dw = da = None
    if need_weight or need_anchor:
        dw, da = _shares((flat.T @ _checks.matrix(x)).to(ctx.dtype), stream, (need_weight, need_anchor))
    return dx, dw, da, flat.sum(0) if need_bias else None, *[None] * 5


# vmap: as in dropconnect_linear.


def _vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    weight: Tensor,
    anchor: Tensor,
    key: Tensor,
    p: float,
    p_tensor: Any,
    *rest: int,
) -> Any:
    refuse_batched_p("mixout", in_dims[4])
    size = info.batch_size
    pair = [_front(t, dim, size) for t, dim in ((weight, in_dims[0]), (anchor, in_dims[1]))]
    rows, cols = _checks.rows_cols(pair[0].shape[1:])  # a 0-d element is one row of one column
    flat = (t.reshape(size * rows, cols) for t in pair)
    return call("mixout", *flat, batch_keys(key, in_dims[2], size), p, p_tensor, *rest).reshape(pair[0].shape), 0


def _linear_vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, anchor: Tensor, bias: Any, key: Tensor, *rest: Any
) -> Any:
    refuse_batched_p("mixout_linear", in_dims[6])
    size = info.batch_size
    x = _front(x, in_dims[0], size)
    if in_dims[1:5] == (None, None, None, None):
        return call("mixout_linear", x, weight, anchor, bias, key, *rest), 0
    weight, anchor = _front(weight, in_dims[1], size), _front(anchor, in_dims[2], size)
    mixed = call("mixout", weight, anchor, batch_keys(key, in_dims[4], size), *rest)
    return batched_linear(x, mixed.to(x.dtype), bias, in_dims[3]), 0


rules("mixout", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
rules("mixout_linear", _linear_fake, setup_context=_linear_setup_context, backward=_linear_backward, vmap=_linear_vmap)
