"""`multi_sample_cross_entropy`: the mean cross entropy of M dropped copies of a head's input, without their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .. import _autocast, _checks
from .._autocast import autocast
from .._backends import call, chosen
from .._registry import rules
from .dropout import refuse_batched_p
from .dropout_linear import linear_arguments
from .multi_sample_linear import samples, settle

# Classes from which on the products are the library's, and a fourth one costs more than keeping the gradients.
WIDE = 129


def multi_sample_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    num_samples: int = 8,
    *,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Cross entropy of a linear head, averaged over M dropout masks of its input; backward draws the masks again.

    Equivalent to: ``torch.stack([F.cross_entropy(F.linear(F.dropout(x, p), weight, bias), target) for _ in range(num_samples)]).mean(0)``

    Sample m uses ``dropout_mask((rows, D), p, key=key, sample=m)``. The M·B·C logits never exist together, neither here
    nor in backward: kept are x, weight, target, the key and M·B log-sum-exps, and backward computes the logits again.

    Where that fourth product is what costs (on the CPU, more than 128 classes) and the loss is one number, forward
    computes the gradients of the operands that require one and backward only scales them: kept are these alone, B·D +
    C·D + C numbers at most, float32 (float64 of float64). So evaluate such a head under `torch.no_grad`.

    Its gradient can't be differentiated again (an error says so); for that, take `F.cross_entropy` of
    `multi_sample_linear`.

    Args:
        x: (…, D), float32, float16, bfloat16 or (on the CPU) float64; under autocast it is cast like in `F.linear`.
        weight: (C, D).
        target: classes (…), int64, or probabilities (…, C), floating. It gets no gradient. A class outside [0, C) that
            is not `ignore_index` raises on the CPU and gives a NaN loss on a GPU, where raising would need a sync.
        bias: (C,) or None.
        p, key, generator: as in `dropout`.
        num_samples: M.
        ce_weight: (C,) or None, weights of the classes; no gradient.
        ignore_index, label_smoothing, reduction: as in `F.cross_entropy`. As there, the mean over classes divides by the
            weights of the targets, and probabilities take no ignore_index ≥ 0.
        row_offset, col_offset: place of x in a larger (rows, D) matrix, in elements.

    Returns:
        () of "mean" and "sum", (…) of "none"; of the dtype of x, float32 under autocast.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, number, probability, key or offset, named in the message.

    Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019.

    >>> x, w, t = torch.ones(2, 4), torch.eye(3, 4), torch.tensor([0, 2])
    >>> loss = multi_sample_cross_entropy(x, w, t, p=0.0)
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(x @ w.T, t))
    True
    """  # noqa: E501  (the plain line stays one line)
    op = "multi_sample_cross_entropy"
    _checks.float_tensor(op, "x", x)
    dtype = None if _autocast.enabled(x.device.type) else x.dtype
    x, weight, bias = autocast(x, weight, bias)
    linear_arguments(op, x, weight, bias)
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have at least one class, got 0")
    samples(op, num_samples)
    _target(op, target, x, weight.shape[0], ignore_index)
    _class_weights(op, ce_weight, x, weight.shape[0])
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing!r}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    stream = settle(op, x, p, num_samples, key, generator, row_offset, col_offset)
    args = x, weight, bias, target, ce_weight, *stream[:4], ignore_index, float(label_smoothing), *stream[4:]
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    if reduction != "none" and any(wanted) and _gradients_in_forward(op, x, weight):
        like = x.new_ones((), dtype=_accumulator(x))
        divisor = like * _divisor(target, ce_weight, ignore_index, like) if reduction == "mean" else like
        loss = call(f"{op}_with_grads", divisor, *args, wanted)[0]
    else:
        loss, _ = call(op, *args)
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / _divisor(target, ce_weight, ignore_index, loss)
    return loss if dtype is None else loss.to(dtype)


def _gradients_in_forward(op: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the C++ kernels run, on a wide head. Under `torch.func` nobody knows yet which gradients are wanted."""
    functorch = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return weight.shape[0] >= WIDE and not functorch and chosen(op, x, weight) == x.device.type == "cpu"


def _target(op: str, target: Tensor, x: Tensor, classes: int, ignore_index: int) -> None:
    if not isinstance(target, Tensor) or (target.dtype != torch.int64 and not target.is_floating_point()):
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"{op}: target must be an int64 or floating Tensor, got {got}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if target.device != x.device:
        raise ValueError(f"{op}: target must be on {x.device}, got {target.device}")
    if target.is_floating_point():
        _checks.shape(op, "target", target, (*x.shape[:-1], classes), "(…, C)")
        if target.requires_grad:
            raise ValueError(f"{op}: target must not require a gradient, got one that does; detach it")
        if ignore_index >= 0:
            raise ValueError(f"{op}: ignore_index must be negative for floating targets, got {ignore_index}")
        return
    _checks.shape(op, "target", target, tuple(x.shape[:-1]), "(…)")
    if _readable(target):
        wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
        if wrong.numel():
            raise ValueError(f"{op}: target must be in [0, C={classes}) or ignore_index, got {wrong[0].item()}")


def _readable(x: Tensor) -> bool:
    """Whether looking at values costs no sync and breaks no trace."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and not torch._C._functorch.is_functorch_wrapped_tensor(x) and not is_fake(x)


def _class_weights(op: str, ce_weight: Tensor | None, x: Tensor, classes: int) -> None:
    if ce_weight is None:
        return
    _checks.float_tensor(op, "ce_weight", ce_weight, like=x, dtype=False)
    _checks.shape(op, "ce_weight", ce_weight, (classes,), "(C,)")
    if ce_weight.requires_grad:
        raise ValueError(f"{op}: ce_weight must not require a gradient, got one that does; detach it")


def _divisor(target: Tensor, ce_weight: Tensor | None, ignore_index: int, like: Tensor) -> Tensor | int:
    """What "mean" divides by: rows of probabilities, or the weights of the classes that are not ignored."""
    if target.is_floating_point():
        return _checks.rows_cols(target.shape)[0]
    valid = target != ignore_index
    if ce_weight is None:
        return valid.sum().to(like.dtype)
    weights = ce_weight.to(like.dtype)[target.clamp(0, ce_weight.shape[0] - 1)]
    return torch.where(valid, weights, 0).sum()


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(
    x: Tensor, weight: Tensor, bias: Any, target: Any, ce_weight: Any, key: Any, num_samples: int, *_: Any
) -> Any:
    loss = x.new_empty(x.shape[:-1], dtype=_accumulator(x))
    return loss, loss.new_empty((num_samples, *x.shape[:-1]))


def _grad_fake(grad: Tensor, logsumexp: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, rest[-1], strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, target, ce_weight, key, _, p, p_tensor, *rest = inputs
    ctx.save_for_backward(output[1], x, weight, bias, target, ce_weight, key, p_tensor)
    ctx.p, ctx.rest = p, rest
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *operands, p_tensor = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = call("multi_sample_cross_entropy_grad", grad, *operands, ctx.p, p_tensor, *ctx.rest, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *[None] * 10


def _grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _grad_backward(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "multi_sample_cross_entropy: must be differentiated once only, got a second derivative; "
        "F.cross_entropy of multi_sample_linear has derivatives of any order"
    )


def _with_grads_fake(divisor: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    shapes = x.shape, weight.shape, weight.shape[:1]
    sums = (divisor.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, rest[-1], strict=True))
    return divisor.new_empty(()), *sums


def _with_grads_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype
    ctx.mark_non_differentiable(*output[1:])


def _with_grads_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = [
        (grad * kept).to(ctx.dtype) if wanted else None
        for kept, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[1:4], strict=True)
    ]
    if torch.is_grad_enabled():  # the kept gradients do not know what they depend on
        grads = [g if g is None else _OnceOnly.apply(g.requires_grad_()) for g in grads]
    return None, *grads, *[None] * 11


class _OnceOnly(torch.autograd.Function):
    """The identity, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    backward = staticmethod(_grad_backward)


def _one_by_one(name: str, p_index: int) -> Any:
    """Batching rule that runs the op on one batch element after another."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        refuse_batched_p("multi_sample_cross_entropy", in_dims[p_index])

        def element(i: int) -> list[Any]:
            pairs = zip(args, in_dims, strict=True)
            return [a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in pairs]

        results = [call(name, *element(i)) for i in range(info.batch_size)]
        outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


rules(
    "multi_sample_cross_entropy",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_one_by_one("multi_sample_cross_entropy", 8),
)
rules(
    "multi_sample_cross_entropy_grad",
    _grad_fake,
    setup_context=_grad_setup_context,
    backward=_grad_backward,
    vmap=_one_by_one("multi_sample_cross_entropy_grad", 9),
)
rules(
    "multi_sample_cross_entropy_with_grads",
    _with_grads_fake,
    setup_context=_with_grads_setup_context,
    backward=_with_grads_backward,
    vmap=_one_by_one("multi_sample_cross_entropy_with_grads", 9),
)
