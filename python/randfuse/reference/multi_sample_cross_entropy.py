"""Reference of `multi_sample_cross_entropy`, of its derivative and of both at once.

With z = D_m(x) Wᵀ + b and a row's target weights q (see `target_weights`), a row's loss is the mean over m of
−Σ_c q_c log softmax(z)_c, and dz = (Σ_c q_c · softmax(z) − q) / M.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from . import streams
from .dropout import dropout
from .multi_sample_linear import _wide, multi_sample_linear


def target_weights(
    target: Tensor, classes: int, ce_weight: Tensor | None, ignore_index: int, smoothing: float
) -> Tensor:
    """q (rows, classes), float64: q_c = w_c ((1 − ε) t_c + ε / C) with t the one-hot class or the probabilities.

    A row of `ignore_index` is 0, one of another class outside [0, classes) is NaN.
    """
    weight = torch.ones(classes, dtype=torch.float64, device=target.device) if ce_weight is None else ce_weight.double()
    if target.is_floating_point():
        return weight * ((1 - smoothing) * target.double().reshape(-1, classes) + smoothing / classes)
    target = target.reshape(-1, 1)
    one_hot = (torch.arange(classes, device=target.device) == target).double()
    q = torch.where((target < 0) | (target >= classes), torch.nan, 1.0)
    q = q * weight * ((1 - smoothing) * one_hot + smoothing / classes)
    return torch.where(target == ignore_index, 0.0, q)


def multi_sample_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ce_weight: Tensor | None,
    key: Tensor,
    num_samples: int,
    p: float,
    p_tensor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    row_offset: int,
    col_offset: int,
) -> tuple[Tensor, Tensor]:
    """x (…, D), weight (C, D), bias (C,), target (…) int64 or (…, C) floating -> loss (…), logsumexp (M, …).

    Both are float32 (float64 for float64): the loss of each row, not yet reduced, 0 where ignored.
    """
    xw, ww = _wide(_checks.matrix(x), weight)
    b = None if bias is None else bias.to(ww.dtype)
    logits = multi_sample_linear(xw, ww, b, key, num_samples, p, p_tensor, row_offset, col_offset)
    lse = logits.logsumexp(-1)
    q = target_weights(target, weight.shape[0], ce_weight, ignore_index, label_smoothing).to(lse.dtype)
    loss = torch.where(q != 0, -q * logits.log_softmax(-1), 0).sum(-1).mean(0)
    return loss.reshape(x.shape[:-1]), lse.reshape(num_samples, *x.shape[:-1])


def multi_sample_cross_entropy_grad(
    grad: Tensor,
    logsumexp: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ce_weight: Tensor | None,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    row_offset: int,
    col_offset: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (…), logsumexp (M, …) -> dx (…, D), dweight (C, D), dbias (C,); what is not asked for is empty (0,)."""
    xw, ww, g = *_wide(_checks.matrix(x), weight), grad.reshape(-1, 1)
    q = target_weights(target, weight.shape[0], ce_weight, ignore_index, label_smoothing).to(xw.dtype)
    dx, dw, db = torch.zeros_like(xw), torch.zeros_like(ww), ww.new_zeros(weight.shape[0])
    for m, lse in enumerate(logsumexp):
        place = key, p, p_tensor, streams.DROPOUT, m, row_offset, col_offset
        dropped = dropout(xw, *place)
        logits = F.linear(dropped, ww, None if bias is None else bias.to(ww.dtype))
        dz = (q.sum(-1, keepdim=True) * (logits - lse.reshape(-1, 1)).exp() - q) * (g / len(logsumexp))
        dz = torch.where((q == 0).all(-1, keepdim=True), 0, dz)
        dx, dw, db = dx + dropout(dz @ ww, *place), dw + dz.T @ dropped, db + dz.sum(0)
    sums = zip((dx.reshape(x.shape), dw, db), output_mask, strict=True)
    results = [s.to(x.dtype) if wanted else x.new_empty(0) for s, wanted in sums]
    return results[0], results[1], results[2]


def multi_sample_cross_entropy_with_grads(
    divisor: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ce_weight: Tensor | None,
    key: Tensor,
    num_samples: int,
    p: float,
    p_tensor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    row_offset: int,
    col_offset: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the rows' losses over divisor (), and its gradients dx (…, D), dweight (C, D), dbias (C,) as wanted.

    All are of the type of divisor, float32 (float64 for float64), so that scaled gradients are rounded once.
    """
    xw, ww, bw = x.to(divisor.dtype), weight.to(divisor.dtype), None if bias is None else bias.to(divisor.dtype)
    rest = p, p_tensor, ignore_index, label_smoothing, row_offset, col_offset
    loss, lse = multi_sample_cross_entropy(x, weight, bias, target, ce_weight, key, num_samples, *rest)
    g = divisor.reciprocal().expand(loss.shape)
    grads = multi_sample_cross_entropy_grad(g, lse, xw, ww, bw, target, ce_weight, key, *rest, output_mask)
    return loss.sum() / divisor, *grads
