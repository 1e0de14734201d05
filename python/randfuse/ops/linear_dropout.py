"""`linear_dropout`: activation, dropout and residual in the epilogue of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _autocast, _checks, keys
from .._backends import call, rate
from .._registry import rules
from ..reference import streams
from ..reference.linear_dropout import ACTIVATIONS
from .dropout import batch_keys, refuse_batched_p
from .dropout_linear import _front, _rows, linear_arguments


def linear_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Linear layer whose output is activated, dropped and added to a residual, in one pass over the output.

    Equivalent to: ``residual + F.dropout(act(F.linear(x, weight, bias)), p)``, the mask being a function of the key

    No mask is stored; the pre-activation is kept for backward only where an activation needs it.

    Args:
        x: (…, K), float32, float16, bfloat16 or (on the CPU) float64; under autocast it is cast like in `F.linear`.
        weight: (N, K).
        bias: (N,) or None.
        p, training, key, generator: as in `dropout`. The stream is that of outputs, so that one key may serve the
            input and the output of a layer without sharing a random word.
        activation: None, "relu", "gelu" (exact) or "silu".
        residual: (…, N) or None.
        row_offset, col_offset: place of the result in a larger (rows, N) matrix, in elements.

    Returns:
        (…, N), of the dtype of x.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, probability, key, activation or offset, as it says.

    >>> x, w, r = torch.ones(2, 4), torch.eye(4), torch.ones(2, 4)
    >>> torch.equal(linear_dropout(x, w, p=1.0, residual=r), r)
    True
    """
    op = "linear_dropout"
    _checks.float_tensor(op, "x", x)
    if residual is not None and _autocast.enabled(x.device.type):
        # residual + F.linear(…) promotes under autocast: a float32 residual stream stays float32.
        out = linear_dropout(
            x,
            weight,
            bias,
            p,
            training,
            activation=activation,
            key=key,
            generator=generator,
            row_offset=row_offset,
            col_offset=col_offset,
        )
        _checks.float_tensor(op, "residual", residual, like=out, dtype=False)
        _checks.shape(op, "residual", residual, tuple(out.shape), "(…, N)")
        return residual + out
    x, weight, bias = _autocast.autocast(x, weight, bias)
    linear_arguments(op, x, weight, bias)
    name = check_activation(op, activation)
    out_shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None:
        _checks.float_tensor(op, "residual", residual, like=x)
        _checks.shape(op, "residual", residual, out_shape, "(…, N)")
    _checks.probability(op, p, x.device)
    rows, cols = _checks.rows_cols(out_shape)
    _checks.stream_range(op, rows, cols, row_offset, col_offset)
    keys.check(op, key, generator, rows, x.device)
    if not training or (not isinstance(p, Tensor) and p == 0):
        y = ACTIVATIONS[name](F.linear(x, weight, bias))
        return y if residual is None else residual + y
    key = keys.resolve(key, generator, x.device)
    save_preact = torch.is_grad_enabled() and name != "none"
    return call(op, x, weight, bias, residual, name, save_preact, key, *rate(p), row_offset, col_offset)[0]


def check_activation(op: str, activation: str | None) -> str:
    """The name that the schema knows it by."""
    if activation is not None and (not isinstance(activation, str) or activation not in ("relu", "gelu", "silu")):
        raise ValueError(f"{op}: activation must be None, 'relu', 'gelu' or 'silu', got {activation!r}")
    return "none" if activation is None else activation


def _fake(
    x: Tensor, weight: Tensor, bias: Any, residual: Any, activation: str, save_preact: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty(y.shape if save_preact else (0,))


def _elementwise_fake(z: Tensor, *_: Any) -> Tensor:
    return z.new_empty(z.shape)


# Derivatives. The pre-activation z is an output of the op, so that a second derivative reaches x, weight and bias
# through it; grad_z is None until somebody asks for one.


def _masked(grad: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, row_offset: int, col_offset: int) -> Tensor:
    return call("dropout", grad, key, p, p_tensor, streams.OUTPUT_DROPOUT, 0, row_offset, col_offset)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _, activation, save_preact, key, p, p_tensor, *offsets = inputs
    need_x, need_weight, *_ = ctx.needs_input_grad
    saved = x if need_weight else None, weight if need_x else None  # of a frozen weight, x need not live on
    ctx.save_for_backward(*saved, output[1] if save_preact else None, key, p_tensor)
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.p, ctx.offsets = activation, p, offsets


def _backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, z, key, p_tensor = ctx.saved_tensors
    if z is None and ctx.activation != "none":  # traced or called without gradients in mind
        raise RuntimeError("linear_dropout: save_preact must be True where a gradient is wanted, got False")
    stream = (key, ctx.p, p_tensor, *ctx.offsets)
    dz = grad_z
    if grad is not None:
        dy = _masked(grad, *stream) if z is None else call("act_dropout_grad", grad, z, ctx.activation, *stream)
        dz = dy if grad_z is None else dy + grad_z
    if dz is None:
        return (None,) * 11
    flat = _checks.matrix(dz)
    dx = dz @ weight if ctx.needs_input_grad[0] else None
    dw = flat.T @ _checks.matrix(x) if ctx.needs_input_grad[1] else None
    db = flat.sum(0) if ctx.needs_input_grad[2] else None
    return dx, dw, db, grad if ctx.needs_input_grad[3] else None, *[None] * 7


def _act_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, activation, key, p, p_tensor, *offsets = inputs
    ctx.save_for_backward(a, b, key, p_tensor)
    ctx.activation, ctx.p, ctx.offsets = activation, p, offsets


def _act_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, _, key, p_tensor = ctx.saved_tensors
    dz = call("act_dropout_grad", grad, z, ctx.activation, key, ctx.p, p_tensor, *ctx.offsets)
    return dz, grad if ctx.needs_input_grad[1] else None, *[None] * 6


def _second_derivative(z: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5 * (2 - z * z)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 - s) * (2 + z * (1 - 2 * s))
    return torch.zeros_like(z)


def _act_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, z, key, p_tensor = ctx.saved_tensors
    stream = (key, ctx.p, p_tensor, *ctx.offsets)
    dg = call("act_dropout_grad", grad, z, ctx.activation, *stream) if ctx.needs_input_grad[0] else None
    dz = _masked(g * _second_derivative(z, ctx.activation) * grad, *stream) if ctx.needs_input_grad[1] else None
    return dg, dz, *[None] * 6


# vmap: as in dropout_linear.


def _vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Any, residual: Any, *rest: Any) -> Any:
    activation, save_preact, key, *stream = rest
    refuse_batched_p("linear_dropout", in_dims[8])
    size = info.batch_size
    x, keys_ = _front(x, in_dims[0], size), batch_keys(key, in_dims[6], size)
    residual = None if residual is None else _front(residual, in_dims[3], size)
    if in_dims[1] is None and in_dims[2] is None:
        y, z = call("linear_dropout", x, weight, bias, residual, activation, save_preact, keys_, *stream)
    else:
        z = _rows(x) @ _front(weight, in_dims[1], size).mT
        z = z if bias is None else z + _front(bias, in_dims[2], size).unsqueeze(1)
        z = z.reshape(*x.shape[:-1], z.shape[-1])
        y = call("act_dropout", z, residual, activation, keys_, *stream)
        z = z if save_preact else z.new_empty(0)
    return (y, z), (0, 0 if save_preact else None)


def _act_vmap(name: str) -> Any:
    def rule(
        info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor | None, activation: str, key: Tensor, *rest: Any
    ) -> Any:
        refuse_batched_p("linear_dropout", in_dims[5])
        size = info.batch_size
        b = None if b is None else _front(b, in_dims[1], size)
        return call(name, _front(a, in_dims[0], size), b, activation, batch_keys(key, in_dims[3], size), *rest), 0

    return rule


rules("linear_dropout", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
for _name, _derivative in (("act_dropout", _act_backward), ("act_dropout_grad", _act_grad_backward)):
    rules(_name, _elementwise_fake, setup_context=_act_setup_context, backward=_derivative, vmap=_act_vmap(_name))
