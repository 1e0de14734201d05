"""The training side: noise a text, and the likelihood bound of what a network makes of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _words
from ._step import Step, sequence_keys
from .schedules import LINEAR, Schedule, level_at, time_of


def sample_times(
    tokens: Tensor,
    *,
    least: float = 1e-3,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Training times (B,) in [least, 1), one in each B-th of that range: a batch sees all levels of noise.

    Sequence b has time (b + u_b)/B of the range, u_b uniform: a stratified sample, so the mean over the batch of the
    loss has less variance than with independent times. float64; tokens (B, L) say the batch and the device.

    >>> times = sample_times(torch.zeros(4, 7, dtype=torch.int64))
    >>> (times * 4).floor().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if not 0 <= least < 1:
        raise ValueError(f"sample_times: least must be in [0, 1), got {least}")
    keys = sequence_keys("sample_times", key, generator, tokens)
    u = _words.uniform(_words.words(keys, _words.CLOCK, keys.new_full((), 2), 1)).squeeze(-1)
    place = torch.arange(len(keys), device=keys.device)
    return least + (1 - least) * (place + u) / max(len(keys), 1)


def corrupt(
    tokens: Tensor,
    t: float | Tensor,
    *,
    mask_id: int,
    schedule: Schedule = LINEAR,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The text at time t: each position becomes [MASK] with probability 1 − α_t, by a coin of 64 bits.

    Args:
        tokens: int64 (B, L), not changed.
        t: a number or a tensor () or (B,), see `sample_times`.
        window: bool (B, L), what may be masked: leave prompts and padding out.
        mask_id, schedule, step, key: as in `ancestral_step`.

    >>> corrupt(torch.tensor([[1, 2, 3]]), 1.0, mask_id=9)
    tensor([[9, 9, 9]])
    """
    state = Step("corrupt", tokens, mask_id, step, window, key, generator)
    level = level_at("corrupt", time_of("corrupt", "t", t, tokens), schedule)
    return tokens.masked_fill(state.window & state.coins(_words.REMASK, level), mask_id)


def loss(
    logits: Tensor,
    tokens: Tensor,
    corrupted: Tensor,
    t: float | Tensor,
    *,
    mask_id: int,
    schedule: Schedule = LINEAR,
    window: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """MDLM's bound on −log p(tokens) in nats: cross entropy of masked positions, weighted with m′(t)/m(t).

    Only masked rows enter the softmax (half of them on average), and [MASK] has no probability.

    Args:
        logits: (B, L, V) of the corrupted text; computed with in float32, float64 for float64.
        tokens, corrupted: int64 (B, L), before and after `corrupt`.
        t: the times of `corrupt`.
        window: bool (B, L), which positions count (all): the mean is over these, masked or not.
        reduction: "mean" over positions, "sum", or "none", which gives (B, L).

    Sahoo et al. 2024; Shi et al., "Simplified and Generalized Masked Diffusion for Discrete Data", NeurIPS 2024.

    >>> x = torch.tensor([[1, 2, 3, 4]])
    >>> y = corrupt(x, 1.0, mask_id=5)
    >>> loss(torch.zeros(1, 4, 6), x, y, 1.0, mask_id=5) - torch.tensor(5.0).log()
    tensor(0.)
    """
    op = "loss"
    state = Step(op, corrupted, mask_id, 0, window, None, None)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"{op}: logits must be a floating Tensor, got {getattr(logits, 'dtype', type(logits).__name__)}"
        )
    if tuple(logits.shape[:-1]) != tuple(tokens.shape) or tokens.shape != corrupted.shape:
        raise ValueError(
            f"{op}: logits must have shape (B, L, V) of tokens and corrupted, got {tuple(logits.shape)} "
            f"of {tuple(tokens.shape)} and {tuple(corrupted.shape)}"
        )
    rows = state.masked.flatten().nonzero().squeeze(-1)
    x = logits.flatten(0, 1)[rows]
    x = x if x.dtype == torch.float64 else x.float()
    if mask_id < x.shape[-1]:
        x = x.index_fill(-1, torch.full((1,), mask_id, device=x.device), -torch.inf)
    weight = schedule.weight(time_of(op, "t", t, tokens)).expand(tokens.shape).flatten()[rows]
    each = F.cross_entropy(x, tokens.flatten()[rows], reduction="none") * weight.to(x.dtype)
    if reduction == "none":
        return each.new_zeros(tokens.numel()).index_put((rows,), each).view_as(tokens)
    return each.sum() if reduction == "sum" else each.sum() / state.window.sum()
