"""`multi_sample_mse`: the mean squared error of M dropped copies of a regression head's input.

Composed of `multi_sample_linear` and torch, so it has no reference, binding or kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _autocast, _checks
from .._autocast import autocast
from .dropout_linear import linear_arguments
from .multi_sample_linear import multi_sample_linear, samples, settle


def multi_sample_mse(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    num_samples: int = 8,
    *,
    reduction: str = "mean",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Squared error of a linear head, averaged over M dropout masks of its input; backward draws the masks again.

    Equivalent to: ``torch.stack([F.mse_loss(F.linear(F.dropout(x, p), weight, bias), target) for _ in range(num_samples)]).mean(0)``

    Composed of `multi_sample_linear`, whose samples it takes, so derivatives of any order exist. The M predictions are
    kept for backward: M numbers for each of the target, which for a regression head is little beside x.

    Args:
        x: (…, D), float32, float16, bfloat16 or (on the CPU) float64; under autocast it is cast like in `F.linear`.
        weight: (C, D).
        target: (…, C), floating, on the device of x; it gets a gradient if it wants one.
        bias, p, num_samples, key, generator, row_offset, col_offset: as in `multi_sample_linear`.
        reduction: "none", "mean" or "sum", as in `F.mse_loss`; the mean over samples is always taken.

    Returns:
        () of "mean" and "sum", (…, C) of "none"; of the dtype of x, float32 under autocast.

    Raises:
        TypeError, ValueError: as `multi_sample_linear`; a wrong target or reduction.

    Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019.

    >>> x, w, t = torch.ones(2, 4), torch.eye(1, 4), torch.zeros(2, 1)
    >>> float(multi_sample_mse(x, w, t, p=0.0))
    1.0
    """  # noqa: E501  (the plain line stays one line)
    op = "multi_sample_mse"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    _checks.float_tensor(op, "x", x)
    dtype = None if _autocast.enabled(x.device.type) else x.dtype
    x, weight, bias = autocast(x, weight, bias)
    linear_arguments(op, x, weight, bias)
    samples(op, num_samples)
    _checks.float_tensor(op, "target", target, like=x, dtype=False)
    _checks.shape(op, "target", target, (*x.shape[:-1], weight.shape[0]), "(…, C)")
    key, *_ = settle(op, x, p, num_samples, key, generator, row_offset, col_offset)
    y = multi_sample_linear(x, weight, bias, p, num_samples, key=key, row_offset=row_offset, col_offset=col_offset)
    wide = torch.promote_types(y.dtype, torch.float32)
    loss = (y.to(wide) - target.to(wide)).square().mean(0)
    loss = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
    return loss if dtype is None else loss.to(dtype)
