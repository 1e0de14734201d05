"""`multi_sample_linear`: one linear layer under M dropout masks of its input, which is read once.

No CPU kernel of its own: `dropout_linear`'s run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, keys
from .._autocast import autocast
from .._backends import call, chosen, rate
from .._registry import rules
from ..reference import streams
from .dropout import batch_keys, refuse_batched_p
from .dropout_linear import linear_arguments
from .multi_sample_scale import MOST_SAMPLES, MeanLinear, multi_sample_scale


def multi_sample_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    num_samples: int = 8,
    *,
    reduce: str = "none",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Linear layer of M independently dropped copies of x, none of which is stored; backward draws the masks again.

    Equivalent to: ``torch.stack([F.linear(F.dropout(x, p), weight, bias) for _ in range(num_samples)])``

    Sample m uses ``dropout_mask((rows, K), p, key=key, sample=m)``, so sample 0 is `dropout_linear`. Differentiable any
    number of times; kept for backward are x, weight and the key.

    ``reduce="mean"`` returns the mean over the samples, in law, with one product: a mean of masks is a
    Binomial(M, 1-p) / M count, drawn directly with M comparisons an element (up to 128 samples). Its masks are not
    those of "none". Know what it does: under a linear layer it is only a weaker dropout. It has the mean and the
    variance of plain dropout with p' = v / (1 + v), v = p / ((1 - p) M): p = 0.5 with 8 samples is p' = 0.11, with 5
    samples 0.17. Averaging losses instead (`multi_sample_cross_entropy`) keeps p and lowers the variance of the
    gradient.

    Args:
        x: (…, K), float32, float16, bfloat16 or (on the CPU) float64; under autocast it is cast like in `F.linear`.
        weight: (N, K), or (M, N, K) with a weight for each sample (not with "mean").
        bias: (N,), or (M, N) if the weight is (M, N, K), or None.
        p, key, generator: as in `dropout`.
        num_samples: M.
        reduce: "none" or "mean".
        row_offset, col_offset: place of x in a larger (rows, K) matrix, in elements.

    Returns:
        (M, …, N), or (…, N) if reduced; of the dtype of x.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, number, probability, key or offset, named in the message.

    Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019.

    >>> x, w, k = torch.ones(2, 4), torch.eye(4), randfuse.key(0)
    >>> y = multi_sample_linear(x, w, p=0.5, num_samples=3, key=k)
    >>> torch.equal(y[2] != 0, randfuse.dropout_mask((2, 4), 0.5, key=k, sample=2))
    True
    """
    op = "multi_sample_linear"
    _checks.float_tensor(op, "x", x)
    x, weight, bias = autocast(x, weight, bias)
    samples(op, num_samples)
    if reduce not in ("none", "mean"):
        raise ValueError(f"{op}: reduce must be 'none' or 'mean', got {reduce!r}")
    if isinstance(weight, Tensor) and weight.dim() == 3 and reduce == "none":
        _own_weights(op, x, weight, bias, num_samples)
    else:
        linear_arguments(op, x, weight, bias)
    stream = settle(op, x, p, num_samples, key, generator, row_offset, col_offset)
    if reduce == "none":
        return call(op, x, weight, bias, *stream)
    samples(op, num_samples, most=MOST_SAMPLES)
    if not 0 <= col_offset <= 2**34 - x.shape[-1]:
        raise ValueError(f"{op}: col_offset must be in [0, 2**34 - cols] for reduce='mean', got {col_offset}")
    if not isinstance(p, Tensor) and p == 0:
        return F.linear(x, weight, bias)
    if chosen("multi_sample_scale", x) == "reference":  # plain PyTorch, which has derivatives of every kind
        return F.linear(multi_sample_scale(x, *stream), weight, bias)
    return MeanLinear.apply(x, weight, bias, *stream)


def samples(op: str, num_samples: object, most: int = 2**32 - 1) -> None:
    """`num_samples` is an int in [1, most]."""
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"{op}: num_samples must be an int, got {type(num_samples).__name__}")
    if not 1 <= num_samples <= most:
        raise ValueError(f"{op}: num_samples must be in [1, {most}], got {num_samples}")


def settle(
    op: str,
    x: Tensor,
    p: float | Tensor,
    num_samples: int,
    key: Tensor | None,
    generator: torch.Generator | None,
    row_offset: int,
    col_offset: int,
) -> tuple[Any, ...]:
    """The stream arguments of a multi-sample op, checked: key, num_samples, p, p_tensor, row_offset, col_offset."""
    _checks.probability(op, p, x.device)
    rows, cols = _checks.rows_cols(x.shape)
    _checks.stream_range(op, rows, cols, row_offset, col_offset)
    keys.check(op, key, generator, rows, x.device)
    if not isinstance(p, Tensor) and p == 0:  # nothing is dropped, so nothing need be drawn
        key = torch.zeros((), dtype=torch.int64, device=x.device)
    return keys.resolve(key, generator, x.device), num_samples, *rate(p), row_offset, col_offset


def _own_weights(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, num_samples: int) -> None:
    """weight (M, N, K) and bias (M, N): a weight for each sample."""
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got 0")
    _checks.float_tensor(op, "weight", weight, like=x)
    n = weight.shape[1]
    _checks.shape(op, "weight", weight, (num_samples, n, x.shape[-1]), "(M, N, K)")
    if bias is not None:
        _checks.float_tensor(op, "bias", bias, like=x)
        _checks.shape(op, "bias", bias, (num_samples, n), "(M, N)")


# y_m = D_m(x) W_mᵀ, dgrad = Σ_m D_m(g_m W_m) and wgrad_m = g_mᵀ D_m(x) are bilinear and each D_m is self-adjoint, so
# the derivative of each consists of the other two: differentiation of any order stays inside this set.


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, key: Tensor, num_samples: int, *_: Any) -> Tensor:
    return x.new_empty((num_samples, *x.shape[:-1], weight.shape[-2]))


def _dgrad_fake(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[1:-1], weight.shape[-1]))


def _wgrad_fake(grad: Tensor, x: Tensor, shared: bool, *_: Any) -> Tensor:
    shape = grad.shape[-1], x.shape[-1]
    return grad.new_empty(shape if shared else (grad.shape[0], *shape))


def _save(ctx: Any, a: Tensor, b: Tensor, shared: bool, key: Tensor, p: float, p_tensor: Any, *place: int) -> None:
    need_a, need_b, *_ = ctx.needs_input_grad
    ctx.save_for_backward(a if need_b else None, b if need_a else None, key, p_tensor)
    ctx.shared, ctx.p, ctx.place = shared, p, place


def _saved(ctx: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    a, b, key, p_tensor = ctx.saved_tensors
    return a, b, (key, ctx.p, p_tensor, *ctx.place)


def _forward(
    x: Tensor, weight: Tensor, num_samples: int, key: Tensor, p: float, p_tensor: Tensor | None, *place: int
) -> Tensor:
    return call("multi_sample_linear", x, weight, None, key, num_samples, p, p_tensor, *place)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, key, _, *rest = inputs
    _save(ctx, x, weight, weight.dim() == 2, key, *rest)
    ctx.shared_bias = bias is None or bias.dim() == 1


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, stream = _saved(ctx)
    dx = call("multi_sample_linear_dgrad", grad, weight, *stream) if ctx.needs_input_grad[0] else None
    dw = call("multi_sample_linear_wgrad", grad, x, ctx.shared, *stream) if ctx.needs_input_grad[1] else None
    db = None
    if ctx.needs_input_grad[2]:
        rows = grad.reshape(grad.shape[0], *_checks.rows_cols(grad.shape[1:]))
        db = rows.sum((0, 1) if ctx.shared_bias else 1)
    return dx, dw, db, *[None] * 6


def _dgrad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, *rest = inputs
    _save(ctx, grad, weight, weight.dim() == 2, *rest)
    ctx.num_samples = grad.shape[0]


def _dgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, weight, stream = _saved(ctx)
    dg = _forward(grad, weight, ctx.num_samples, *stream) if ctx.needs_input_grad[0] else None
    dw = call("multi_sample_linear_wgrad", g, grad, ctx.shared, *stream) if ctx.needs_input_grad[1] else None
    return dg, dw, *[None] * 5


def _wgrad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, shared, *rest = inputs
    _save(ctx, grad, x, shared, *rest)
    ctx.num_samples = grad.shape[0]


def _wgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, x, stream = _saved(ctx)
    dg = _forward(x, grad, ctx.num_samples, *stream) if ctx.needs_input_grad[0] else None
    dx = call("multi_sample_linear_dgrad", g, grad, *stream) if ctx.needs_input_grad[1] else None
    return dg, dx, *[None] * 6


# vmap. Batch elements become runs of rows with keys of their own. A batched weight cannot share one GEMM, so those
# cases mask once a sample and use a batched product.


def _front(x: Tensor, dim: int | None, size: int, to: int = 0) -> Tensor:
    return x.unsqueeze(to).expand(*x.shape[:to], size, *x.shape[to:]) if dim is None else x.movedim(dim, to)


def _drop(x: Tensor, sample: int, keys_: Tensor, p: float, p_tensor: Tensor | None, *place: int) -> Tensor:
    return call("dropout", x, keys_, p, p_tensor, streams.DROPOUT, sample, *place)


def _dropped(x: Tensor, num_samples: int, *stream: Any) -> Tensor:
    """(M, batch, rows, K) of x (batch, …, K)."""
    x = x.reshape(x.shape[0], *_checks.rows_cols(x.shape[1:]))
    return torch.stack([_drop(x, m, *stream) for m in range(num_samples)])


def _rows(grad: Tensor) -> Tensor:
    """(M, batch, rows, N) of grad (M, batch, …, N)."""
    return grad.reshape(*grad.shape[:2], *_checks.rows_cols(grad.shape[2:]))


def _own(weight: Tensor, dim: int | None, size: int) -> Tensor:
    """(M or 1, batch, N, K) of a weight that each batch element has."""
    weight = _front(weight, dim, size)
    return weight.unsqueeze(0) if weight.dim() == 3 else weight.transpose(0, 1)


def _vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key: Tensor,
    num_samples: int,
    *rest: Any,
) -> Any:
    refuse_batched_p("multi_sample_linear", in_dims[6])
    size = info.batch_size
    x, keys_ = _front(x, in_dims[0], size), batch_keys(key, in_dims[3], size)
    if in_dims[1] is None and in_dims[2] is None:
        return call("multi_sample_linear", x, weight, bias, keys_, num_samples, *rest), 1
    y = _dropped(x, num_samples, keys_, *rest) @ _own(weight, in_dims[1], size).mT
    if bias is not None:
        bias = _front(bias, in_dims[2], size)
        y = y + (bias if bias.dim() == 2 else bias.transpose(0, 1)).unsqueeze(-2)
    return y.reshape(num_samples, *x.shape[:-1], y.shape[-1]), 1


def _dgrad_vmap(info: Any, in_dims: tuple[Any, ...], grad: Tensor, weight: Tensor, key: Tensor, *rest: Any) -> Any:
    refuse_batched_p("multi_sample_linear", in_dims[4])
    size = info.batch_size
    grad, keys_ = _front(grad, in_dims[0], size, 1), batch_keys(key, in_dims[2], size)
    if in_dims[1] is None:
        return call("multi_sample_linear_dgrad", grad, weight, keys_, *rest), 0
    products = _rows(grad) @ _own(weight, in_dims[1], size)
    dx = torch.stack([_drop(product, m, keys_, *rest) for m, product in enumerate(products)]).sum(0)
    return dx.reshape(*grad.shape[1:-1], dx.shape[-1]), 0


def _wgrad_vmap(
    info: Any, in_dims: tuple[Any, ...], grad: Tensor, x: Tensor, shared: bool, key: Tensor, *rest: Any
) -> Any:
    refuse_batched_p("multi_sample_linear", in_dims[5])
    size = info.batch_size
    grad, x, keys_ = _front(grad, in_dims[0], size, 1), _front(x, in_dims[1], size), batch_keys(key, in_dims[3], size)
    dw = _rows(grad).mT @ _dropped(x, grad.shape[0], keys_, *rest)
    return (dw.sum(0), 0) if shared else (dw, 1)


rules("multi_sample_linear", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
rules(
    "multi_sample_linear_dgrad",
    _dgrad_fake,
    setup_context=_dgrad_setup_context,
    backward=_dgrad_backward,
    vmap=_dgrad_vmap,
)
rules(
    "multi_sample_linear_wgrad",
    _wgrad_fake,
    setup_context=_wgrad_setup_context,
    backward=_wgrad_backward,
    vmap=_wgrad_vmap,
)
