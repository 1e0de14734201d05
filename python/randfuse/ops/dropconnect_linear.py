"""`dropconnect_linear`: F.linear with a dropped weight, and `dropconnect`, the dropped weight itself.

No CPU kernel of its own: `dropout`'s pass masks the weight. No CUDA kernel by design: Triton has it.
"""

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
from .dropout import batch_keys, refuse_batched_p
from .dropout_linear import _front, _rows, linear_arguments


def dropconnect(
    weight: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """`dropout` of a weight, with the stream of weights: one key may also serve the inputs of the layer.

    Equivalent to: ``F.dropout(weight, p)``, the mask being a function of the key

    Args:
        weight: (…, K), float32, float16, bfloat16 or (on the CPU) float64; seen as (rows, K), for F.linear (N, K).
        p, training, key, generator, row_offset, col_offset: as in `dropout`.

    Raises:
        TypeError, ValueError: as in `dropout`.

    >>> dropconnect(torch.ones(2, 4), 1.0)
    tensor([[0., 0., 0., 0.],
            [0., 0., 0., 0.]])
    """
    op = "dropconnect"
    _checks.float_tensor(op, "weight", weight)
    if weight_arguments(op, weight, p, training, key, generator, row_offset, col_offset):
        return weight
    key = keys.resolve(key, generator, weight.device)
    return drop_weight(weight, key, *rate(p), row_offset, col_offset)


def dropconnect_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Linear layer whose weights are dropped, by one mask for the whole batch.

    Equivalent to: ``F.linear(x, dropconnect(weight, p, key=key), bias)``

    What backward keeps is x, weight and the key: neither a mask nor a dropped weight, which is made again. The bias is
    not dropped (the paper's bias is). Differentiable any number of times.

    Args:
        x: (…, K), float32, float16, bfloat16 or (on the CPU) float64; under autocast it is cast like in `F.linear`.
        weight: (N, K).
        bias: (N,) or None.
        p, training, generator: as in `dropout`.
        key: int64 () or (G,), G dividing N: run g of N/G output features reads key g.
        row_offset, col_offset: place of the weight in a larger one, in output and input features: a tensor-parallel
            shard gets its part of the whole mask.

    Returns:
        (…, N), of the dtype of x.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, probability, key or offset, named in the message.

    Wan et al., "Regularization of Neural Networks using DropConnect", ICML 2013.

    >>> x, w, k = torch.eye(4), torch.ones(3, 4), randfuse.key(0)
    >>> torch.equal(dropconnect_linear(x, w, p=0.5, key=k), dropconnect(w, 0.5, key=k).t())
    True
    """
    op = "dropconnect_linear"
    _checks.float_tensor(op, "x", x)
    x, weight, bias = autocast(x, weight, bias)
    linear_arguments(op, x, weight, bias)
    if weight_arguments(op, weight, p, training, key, generator, row_offset, col_offset):
        return F.linear(x, weight, bias)
    key = keys.resolve(key, generator, x.device)
    return call(op, x, weight, bias, key, *rate(p), row_offset, col_offset)


def weight_arguments(
    op: str, weight: Tensor, p: object, training: bool, key: Any, generator: Any, row_offset: int, col_offset: int
) -> bool:
    """Checks what the weight masks have in common; True where there is nothing to draw."""
    _checks.probability(op, p, weight.device)
    rows, cols = _checks.rows_cols(weight.shape)
    _checks.stream_range(op, rows, cols, row_offset, col_offset)
    keys.check(op, key, generator, rows, weight.device)
    return not training or (not isinstance(p, Tensor) and p == 0)


def drop_weight(
    weight: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, row_offset: int, col_offset: int
) -> Tensor:
    """D(weight) by the stream of weights; D is linear and its own adjoint, so it is also the gradient's last step."""
    return call("dropout", weight, key, p, p_tensor, streams.WEIGHT_MASK, 0, row_offset, col_offset)


# y = x D(W)ᵀ + b has dx = g D(W) and dW = D(gᵀ x). Both are composed of a product and `dropout`, which know their own
# derivatives. Bytes: a pass over the weight (a read and a write of NK) beside each product, against 2MNK flops: for M
# rows it is 1/M of the work, so it is not worth a product of our own; and D(W) is freed as soon as it has been used.


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, key, p, p_tensor, *offsets = inputs
    need_x, need_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, key, p_tensor)
    ctx.p, ctx.offsets = p, offsets


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, key, p_tensor = ctx.saved_tensors
    stream, flat = (key, ctx.p, p_tensor, *ctx.offsets), _checks.matrix(grad)
    dx = grad @ drop_weight(weight, *stream) if ctx.needs_input_grad[0] else None
    dw = drop_weight(flat.T @ _checks.matrix(x), *stream) if ctx.needs_input_grad[1] else None
    db = flat.sum(0) if ctx.needs_input_grad[2] else None
    return dx, dw, db, *[None] * 5


# vmap. One weight, key and bias leave one product for the whole batch; else each element has a weight of its own.


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None, bias_dim: int | None) -> Tensor:
    """x (batch, …, K), weight (batch, N, K) and a bias that has its batch at bias_dim -> (batch, …, N)."""
    y = _rows(x) @ weight.mT
    y = y if bias is None else y + _front(bias, bias_dim, x.shape[0]).unsqueeze(1)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None, key: Tensor, *rest: Any
) -> Any:
    refuse_batched_p("dropconnect_linear", in_dims[5])
    size = info.batch_size
    x = _front(x, in_dims[0], size)
    if in_dims[1:4] == (None, None, None):
        return call("dropconnect_linear", x, weight, bias, key, *rest), 0
    weight = drop_weight(_front(weight, in_dims[1], size), batch_keys(key, in_dims[3], size), *rest)
    return batched_linear(x, weight, bias, in_dims[2]), 0


rules("dropconnect_linear", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
