"""`lora_linear`: a linear layer with a low-rank adapter, dropout on the adapter's input or on its factors.

No CPU kernel of its own: `dropout_linear`'s run. No CUDA kernel by design: Triton has it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _autocast, _checks, keys
from .._backends import call, rate
from .._registry import rules
from ..reference import streams
from .dropout import batch_keys, refuse_batched_p
from .dropout_linear import _front, _rows, linear_arguments

A_COLUMN_STREAM, B_ROW_STREAM = 8, 9  # sub-streams (`sample`) of the structured choices, docs/streams.md
FACTOR_COLUMNS = 2**34  # their lanes have 32 bits, four to one of 2**32 blocks


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    p: float | Tensor = 0.0,
    training: bool = True,
    *,
    drop: str = "input",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Linear layer plus a low-rank adapter with dropout; neither the mask nor a dropped or widened x is stored.

    Equivalent to: ``F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropout(x, p, key=key), lora_a), lora_b)``

    The adapter reads x once, adds to the output of the base product in place, and in backward adds its dx to that of
    the base product in place. What backward keeps is x (unless lora_a and weight are frozen), weights and rows * r
    numbers. With p=0 or training=False nothing is drawn and the rest is the same.

    drop="factors" is LoRA Dropout: whole columns of lora_a (inputs) and rows of lora_b (outputs) are dropped for the
    batch, K + N decisions, and the kept ones scaled by 1/(1 - effective_p) each, so that the mean over masks of
    lora_b @ lora_a is itself. Its test-time ensemble is `lora_ensemble`.

    Several adapters of one x (q, k, v): `lora_updates` reads x once for all. Calls of this function with one key and
    samples 0, 1, 2 … have a mask each, as in PEFT; calls with one key and one sample share a mask.

    Args:
        x: (…, K), float32, float16, bfloat16 or (on the CPU) float64; under autocast x, weight and bias are cast like
            in `F.linear`.
        weight, bias: (N, K) and (N,) or None, of x's dtype; usually frozen.
        lora_a, lora_b: (r, K) and (N, r), both of x's dtype or both float32; products with them accumulate in float32.
        scaling: factor of the adapter, lora_alpha / r or lora_alpha / sqrt(r).
        p, training, key, generator: as in `dropout`. The mask of drop="input" is ``dropout_mask((rows, K), p, key=key,
            sample=sample)``; drop="factors" takes a key ().
        drop: "input" or "factors".
        sample: which of the independent masks of the key.
        row_offset, col_offset: place of x in a larger (rows, K) matrix, in elements. There is no offset of the output:
            with drop="factors" rows of lora_b count from 0, so a shard of N needs the whole layer's call or another
            key.

    Returns:
        (…, N), of the dtype of x.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, probability, key, drop or offset, named in the message.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv:2106.09685); Lin et al., "LoRA
    Dropout as a Sparsity Regularizer for Overfitting Control" (arXiv:2404.09610).

    >>> x, w, a, b = torch.ones(2, 4), torch.zeros(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    >>> lora_linear(x, w, None, a, b, scaling=0.5)
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """
    op = "lora_linear"
    _checks.float_tensor(op, "x", x)
    if _autocast.enabled(x.device.type):
        x, weight, bias = _autocast.autocast(x, weight, bias)
        for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
            _checks.float_tensor(op, name, factor, like=x, dtype=False)
        lora_a, lora_b = (t if t.dtype == torch.float32 else t.to(x.dtype) for t in (lora_a, lora_b))
    linear_arguments(op, x, weight, bias)
    _factor_arguments(op, x, weight, lora_a, lora_b)
    if drop not in ("input", "factors"):
        raise ValueError(f"{op}: drop must be 'input' or 'factors', got {drop!r}")
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"{op}: scaling must be a number, got {type(scaling).__name__}")
    _checks.probability(op, p, x.device)
    rows, cols = _checks.rows_cols(x.shape)
    _checks.stream_range(op, rows, cols, row_offset, col_offset, sample)
    keys.check(op, key, generator, rows, x.device)
    if drop == "factors" and key is not None and key.dim() != 0:
        raise ValueError(f"{op}: key must have shape () for drop='factors', got {tuple(key.shape)}")
    if drop == "factors" and col_offset + cols > FACTOR_COLUMNS:
        raise ValueError(f"{op}: col_offset + K must be at most 2**34 for drop='factors', got {col_offset + cols}")
    drawing = training and (isinstance(p, Tensor) or p != 0)
    if drawing:
        key = keys.resolve(key, generator, x.device)
        if drop == "factors":
            lora_a, lora_b = drop_factors(lora_a, lora_b, p, key, col_offset, sample)
            drawing = False
    if not drawing:  # the key is not looked at
        p, key = 0.0, torch.zeros((), dtype=torch.int64, device=x.device)
    place = (sample, row_offset, col_offset)
    return call(op, x, weight, bias, lora_a, lora_b, float(scaling), key, *rate(p), *place)[0]


def lora_ensemble(
    lora_a: Tensor, lora_b: Tensor, p: float | Tensor, num_samples: int, *, key: Tensor
) -> tuple[Tensor, Tensor]:
    """One adapter of rank num_samples * r that is the mean of `num_samples` adapters with dropped factors.

    Equivalent to: ``mean of lora_linear(…, drop="factors", key=k) over k in split(key, num_samples)``, for one layer

    This is the test-time ensemble of LoRA Dropout for a layer: evaluate `lora_linear` with the result and the same
    scaling. It averages outputs of a layer; the paper averages outputs of the network, which for a deep network is not
    the same (a nonlinearity does not commute with a mean) and needs `num_samples` forward passes.

    Args:
        lora_a: (r, K).
        lora_b: (N, r).
        p: probability of dropping a column of lora_a or a row of lora_b.
        num_samples: number of masks, at least 1.
        key: int64 ().

    Returns:
        lora_a (num_samples * r, K) and lora_b (N, num_samples * r).

    Raises:
        TypeError, ValueError: a wrong shape, probability, key or number, named in the message.

    >>> a, b = lora_ensemble(torch.ones(2, 5), torch.ones(3, 2), 0.5, 4, key=randfuse.key(0))
    >>> a.shape, b.shape
    (torch.Size([8, 5]), torch.Size([3, 8]))
    """
    op = "lora_ensemble"
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        _checks.float_tensor(op, name, factor, like=lora_a)
        if factor.dim() != 2:
            raise ValueError(f"{op}: {name} must have two dimensions, got {tuple(factor.shape)}")
    if lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(f"{op}: lora_b must have shape (N, r={lora_a.shape[0]}), got {tuple(lora_b.shape)}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"{op}: num_samples must be a positive int, got {num_samples}")
    _checks.probability(op, p, lora_a.device)
    _checks.key_tensor(op, key, 1, lora_a.device)
    (r, k), n = lora_a.shape, lora_b.shape[0]
    a, b = drop_factors(lora_a, lora_b, p, keys.split(key.reshape(()), num_samples))
    return a.reshape(num_samples * r, k), (b / num_samples).movedim(0, 1).reshape(n, num_samples * r)


def drop_factors(
    lora_a: Tensor, lora_b: Tensor, p: float | Tensor, key: Tensor, col_offset: int = 0, sample: int = 0
) -> tuple[Tensor, Tensor]:
    """For keys (…): lora_a (…, r, K) with dropped columns, lora_b (…, N, r) with dropped rows, the rest scaled."""
    key = keys.fold_in(key, sample) if sample else key
    t = streams.threshold(p.to(key.device) if isinstance(p, Tensor) else p)
    wide_a, wide_b = lora_a.to(_wide(lora_a)), lora_b.to(_wide(lora_b))  # rounded once, after scaling
    scale = torch.as_tensor(streams.scale(t), dtype=wide_a.dtype).to(key.device)
    rounds = streams.WORD_ROUNDS

    def keep(stream: int, first: int, size: int) -> Tensor:
        place = torch.arange(first, first + size, device=key.device)
        row = torch.zeros_like(key)
        lane = streams.lanes(key, row, place, op=streams.STRUCTURED, width=32, rounds=rounds, sample=stream)
        return lane >= t * 65536  # the high half of the lane decides: effective_p is that of every other mask

    a = torch.where(keep(A_COLUMN_STREAM, col_offset, lora_a.shape[1]).unsqueeze(-2), wide_a * scale, 0)
    b = torch.where(keep(B_ROW_STREAM, 0, lora_b.shape[0]).unsqueeze(-1), wide_b * scale, 0)
    return a.to(lora_a.dtype), b.to(lora_b.dtype)


def _factor_arguments(op: str, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    """lora_a (r, K) and lora_b (N, r), both of x's dtype or both float32, on its device."""
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        _checks.float_tensor(op, name, factor, like=x, dtype=getattr(factor, "dtype", None) != torch.float32)
    if lora_a.dtype != lora_b.dtype or (x.dtype == torch.float64 and lora_a.dtype != x.dtype):
        wanted = x.dtype if x.dtype == torch.float64 else lora_a.dtype
        raise TypeError(f"{op}: lora_a and lora_b must be {wanted}, got {lora_a.dtype} and {lora_b.dtype}")
    if lora_a.dim() != 2 or lora_a.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: lora_a must have shape (r, K={x.shape[-1]}), got {tuple(lora_a.shape)}")
    _checks.shape(op, "lora_b", lora_b, (weight.shape[0], lora_a.shape[0]), "(N, r)")


# What has the size of the rank is wide: float32, or float64 beside float64. The products down (s = D(x) Aᵀ), dgrad
# (g W + D(ds A)) and wgrad (dsᵀ D(x)) are closed under differentiation; with p = 0 they are also those of lora_b.


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(x: Tensor, weight: Tensor, bias: Any, lora_a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _down_fake(x, lora_a)


def _down_fake(x: Tensor, lora_a: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], lora_a.shape[0]), dtype=_wide(x))


def _dgrad_fake(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _wgrad_fake(ds: Tensor, x: Tensor, *_: Any) -> Tensor:
    return ds.new_empty((ds.shape[-1], x.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, ctx.scaling, key, ctx.p, p_tensor, *ctx.place = inputs
    need_x, need_weight, _, need_a, need_b, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        x if need_weight or need_a else None,
        weight if need_x else None,
        lora_a,
        lora_b,
        output[1] if need_b else None,
        key,
        p_tensor,
    )


def _backward(ctx: Any, grad: Tensor, grad_s: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, s, key, p_tensor = ctx.saved_tensors
    stream, undropped = (key, ctx.p, p_tensor, *ctx.place), (key, 0.0, None, 0, 0, 0)
    need_x, need_weight, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    dx = dw = db = da = dlb = None
    if need_x or need_a:
        ds = ctx.scaling * call("lora_linear_down", grad, lora_b.t(), *undropped) + grad_s
        dx = call("lora_linear_dgrad", grad, weight, ds, lora_a, *stream) if need_x else None
        da = call("lora_linear_wgrad", ds, x, *stream).to(lora_a.dtype) if need_a else None
    if need_weight:
        dw = _checks.matrix(grad).T @ _checks.matrix(x)
    if need_bias:
        db = _checks.matrix(grad).sum(0)
    if need_b:
        dlb = (ctx.scaling * call("lora_linear_wgrad", s, grad, *undropped)).T.to(lora_b.dtype)
    return dx, dw, db, da, dlb, *[None] * 7


def _dropped(x: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, *place: int) -> Tensor:
    return call("dropout", x, key, p, p_tensor, streams.DROPOUT, *place)


def _saving(operands: int) -> Any:
    """A context of the first `operands` inputs, which are all needed, and the stream."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        key, ctx.p, p_tensor, *ctx.place = inputs[operands:]
        ctx.save_for_backward(*inputs[:operands], key, p_tensor)

    return setup_context


def _saved(ctx: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    *operands, key, p_tensor = ctx.saved_tensors
    return tuple(operands), (key, ctx.p, p_tensor, *ctx.place)


def _down_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, lora_a), stream = _saved(ctx)
    dx = _dropped((grad @ lora_a.to(grad.dtype)).to(x.dtype), *stream) if ctx.needs_input_grad[0] else None
    da = call("lora_linear_wgrad", grad, x, *stream).to(lora_a.dtype) if ctx.needs_input_grad[1] else None
    return dx, da, *[None] * 6


def _dgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (g, weight, ds, lora_a), stream = _saved(ctx)
    need_g, need_weight, need_ds, need_a, *_ = ctx.needs_input_grad
    dg = F.linear(grad, weight) if need_g else None
    dw = _checks.matrix(g).T @ _checks.matrix(grad) if need_weight else None
    dds = call("lora_linear_down", grad, lora_a, *stream) if need_ds else None
    da = call("lora_linear_wgrad", ds, grad, *stream).to(lora_a.dtype) if need_a else None
    return dg, dw, dds, da, *[None] * 6


def _wgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ds, x), stream = _saved(ctx)
    dds = call("lora_linear_down", x, grad, *stream) if ctx.needs_input_grad[0] else None
    dx = _dropped((ds @ grad).to(x.dtype), *stream) if ctx.needs_input_grad[1] else None
    return dds, dx, *[None] * 6


# vmap: batch elements become runs of rows with keys of their own; batched weights take batched products of torch.


def _vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *args: Any) -> Any:
    refuse_batched_p("lora_linear", in_dims[8])
    *weights, scaling, key, p, p_tensor, sample, row_offset, col_offset = args
    size = info.batch_size
    x, stream = _front(x, in_dims[0], size), (batch_keys(key, in_dims[6], size), p, p_tensor, sample, row_offset)
    if all(d is None for d in in_dims[1:5]):
        return call("lora_linear", x, *weights, scaling, *stream, col_offset), (0, 0)
    weight, bias, lora_a, lora_b = weights
    weight, lora_a, lora_b = (
        _front(w, d, size) for w, d in ((weight, in_dims[1]), (lora_a, in_dims[3]), (lora_b, in_dims[4]))
    )
    s = _rows(_dropped(x, *stream, col_offset)).to(_wide(x)) @ lora_a.to(_wide(x)).mT
    y = _rows(x) @ weight.mT + (scaling * (s @ lora_b.to(s.dtype).mT)).to(x.dtype)
    y = y if bias is None else y + _front(bias, in_dims[2], size).unsqueeze(1)
    return tuple(t.reshape(*x.shape[:-1], t.shape[-1]) for t in (y, s)), (0, 0)


def _down_vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, lora_a: Tensor, key: Tensor, *rest: Any) -> Any:
    refuse_batched_p("lora_linear_down", in_dims[4])
    size = info.batch_size
    x, keys_ = _front(x, in_dims[0], size), batch_keys(key, in_dims[2], size)
    if in_dims[1] is None:
        return call("lora_linear_down", x, lora_a, keys_, *rest), 0
    s = _rows(_dropped(x, keys_, *rest)).to(_wide(x)) @ _front(lora_a, in_dims[1], size).to(_wide(x)).mT
    return s.reshape(*x.shape[:-1], s.shape[-1]), 0


def _dgrad_vmap(
    info: Any, in_dims: tuple[Any, ...], grad: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, *rest: Any
) -> Any:
    refuse_batched_p("lora_linear_dgrad", in_dims[6])
    size, (key, *stream) = info.batch_size, rest
    grad, ds = _front(grad, in_dims[0], size), _front(ds, in_dims[2], size)
    keys_ = batch_keys(key, in_dims[4], size)
    if in_dims[1] is None and in_dims[3] is None:
        return call("lora_linear_dgrad", grad, weight, ds, lora_a, keys_, *stream), 0
    weight, lora_a = _front(weight, in_dims[1], size), _front(lora_a, in_dims[3], size)
    update = _dropped((_rows(ds) @ lora_a.to(ds.dtype)).to(grad.dtype), keys_, *stream)
    dx = _rows(grad) @ weight + update
    return dx.reshape(*grad.shape[:-1], dx.shape[-1]), 0


def _wgrad_vmap(info: Any, in_dims: tuple[Any, ...], ds: Tensor, x: Tensor, key: Tensor, *rest: Any) -> Any:
    refuse_batched_p("lora_linear_wgrad", in_dims[4])
    size = info.batch_size
    ds, x, keys_ = _front(ds, in_dims[0], size), _front(x, in_dims[1], size), batch_keys(key, in_dims[2], size)
    return _rows(ds).mT @ _rows(_dropped(x, keys_, *rest)).to(ds.dtype), 0


rules("lora_linear", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
rules("lora_linear_down", _down_fake, setup_context=_saving(2), backward=_down_backward, vmap=_down_vmap)
rules("lora_linear_dgrad", _dgrad_fake, setup_context=_saving(4), backward=_dgrad_backward, vmap=_dgrad_vmap)
rules("lora_linear_wgrad", _wgrad_fake, setup_context=_saving(2), backward=_wgrad_backward, vmap=_wgrad_vmap)
