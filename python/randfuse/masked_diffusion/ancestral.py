"""Ancestral sampling of absorbing (masked) diffusion: MDLM's step, Bernoulli first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._step import Logits, Sampling, Step, mask_of
from ._words import UNMASK
from .schedules import LINEAR, Schedule, level_at, times_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def ancestral_step(
    logits: Logits,
    tokens: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    *,
    mask_id: int,
    schedule: Schedule = LINEAR,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    **sampling: Unpack[Sampling],
) -> Tensor:
    """One step from time t to s < t: every masked position is decoded with probability (α_s − α_t) / (1 − α_t).

    Whether a position changes is decided before what it becomes, by a coin of 64 bits. So only rows that change are
    sampled (one in T of T steps), and the token's law has no rare classes that floating point could lose: MDLM draws
    both at once, which in float32 lowers the temperature (Zheng et al. 2024).

    Args:
        logits: (B, L, V), or a function that gives (R, V) for rows (R,) of the flattened positions; both decode the
            same tokens. Not called if nothing changes. [MASK] is never drawn, whatever its logit.
        tokens: int64 (B, L), not changed.
        t, s: numbers or tensors () or (B,) in [0, 1], s ≤ t; s = 0 is the end and decodes everything.
        mask_id: the [MASK] id; may lie outside of V.
        schedule: level of noise, see `masked_diffusion.LogLinear`.
        step: number of the step, below 2**31, an int or int64 () or (B,). A step must not be used twice with a key.
        window: bool (B, L), positions that take part; None is all.
        key: int64 () or (B,), a key for each sequence; () stands for `split(key, B)`. Sequences do not influence each
            other: with its key a sequence gives the same tokens in any batch, padded or not.
        sampling: temperature, top_k, top_p, min_p, exclude, uncond_logits, cfg_scale, method of
            `randfuse.categorical_sample`; per-row tensors have shape (B, L).

    Sahoo et al., "Simple and Effective Masked Diffusion Language Models", NeurIPS 2024.

    >>> tokens = torch.full((1, 6), 9)
    >>> half = ancestral_step(torch.zeros(1, 6, 10), tokens, 1.0, 0.5, mask_id=9, key=randfuse.key(0))
    >>> whole = ancestral_step(torch.zeros(1, 6, 10), half, 0.5, 0.0, mask_id=9, step=1, key=randfuse.key(0))
    >>> bool((whole != 9).all())
    True
    """
    op = "ancestral_step"
    state = Step(op, tokens, mask_id, step, window, key, generator)
    m_t, m_s = (level_at(op, time, schedule) for time in times_of(op, t, s, tokens))
    return state.reveal(logits, state.masked & state.coins(UNMASK, unmask_probability(m_t, m_s)), sampling)


def reveal(
    logits: Logits,
    tokens: Tensor,
    where: Tensor,
    *,
    mask_id: int | None,
    step: int | Tensor = 0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    **sampling: Unpack[Sampling],
) -> Tensor:
    """The tokens with fresh draws where `where` (bool, (B, L)) is True; arguments as in `ancestral_step`.

    The half of every step that draws; for rules of your own about which positions change.
    """
    mask_of("reveal", "where", where, tokens)
    return Step("reveal", tokens, mask_id, step, None, key, generator).reveal(logits, where, sampling)


def unmask_probability(m_t: Tensor, m_s: Tensor) -> Tensor:
    """(α_s − α_t) / (1 − α_t) of masked levels m = 1 − α; 1 where t is the end already."""
    return torch.where(m_t > 0, (m_t - m_s) / m_t, 1.0)
