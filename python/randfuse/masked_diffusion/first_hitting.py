"""First-hitting sampling: jump to the next time at which a position is decoded, exactly, instead of stepping there."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _words
from ._step import Logits, Sampling, Step
from .schedules import LINEAR, Schedule, level_at

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FirstHit(NamedTuple):
    """Where the next decoded positions of each sequence are, (B, L) bool with at most `hits` True a row, and when."""

    where: Tensor
    clock: Tensor


class FirstHitting(NamedTuple):
    """Tokens after an event and the clocks (B,)."""

    tokens: Tensor
    clock: Tensor


def first_hit(
    tokens: Tensor,
    clock: Tensor,
    *,
    hits: int = 1,
    mask_id: int,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> FirstHit:
    """The next `hits` events of each sequence, before a model is asked; arguments as in `first_hitting_step`.

    Of n masked positions, each still masked at a lower level m′ with probability m′/m, the first to be decoded is
    hit at m·u^(1/n), and it is any of them: log m − E/n with E ~ Exp(1). `schedule.time(clock.exp())` is its time.
    """
    return _hit(Step("first_hit", tokens, mask_id, step, window, key, generator), clock, hits)


def _hit(state: Step, clock: Tensor, hits: int) -> FirstHit:
    if not isinstance(clock, Tensor) or clock.dtype != torch.float64 or clock.shape != state.keys.shape:
        got = f"{clock.dtype} {tuple(clock.shape)}" if isinstance(clock, Tensor) else type(clock).__name__
        raise ValueError(f"{state.op}: clock must be float64 (B,), got {got}")
    if isinstance(hits, bool) or not isinstance(hits, int) or hits < 1:
        raise ValueError(f"{state.op}: hits must be a positive int, got {hits!r}")
    events = state.step + torch.arange(hits, device=clock.device).unsqueeze(-1)
    times, places = _words.blocks(state.keys, _words.CLOCK, torch.zeros_like(state.step), events)  # (hits, B)
    left = state.masked
    for time, place in zip(_words.exponential(times), places, strict=True):
        n = left.sum(-1)
        left = left & (left.cumsum(-1) != _words.index_below(place, n).unsqueeze(-1) + 1)
        clock = torch.where(n > 0, clock - time / n.clamp(min=1), clock)
    return FirstHit(state.masked & ~left, clock)


def first_hitting_step(
    logits: Logits,
    tokens: Tensor,
    clock: Tensor,
    *,
    hits: int = 1,
    mask_id: int,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    **sampling: Unpack[Sampling],
) -> FirstHitting:
    """Decode one position of each sequence that has one left, at the exact time of its event.

    In law this is ancestral sampling with infinitely many steps, in as many model calls as there are masked positions,
    and one row of logits is sampled for each. Every sequence has a clock and a count of its own.

    Args:
        logits: as in `ancestral_step`; for a model that knows the time, those at the time of the event (`first_hit`).
        tokens: int64 (B, L).
        clock: float64 (B,), log(1 − α) of where each sequence is: zeros to begin with, or log m(1) of a schedule that
            does not begin fully masked. In logarithms, since differences vanish at the end of long texts.
        hits: decode so many positions at once, at the time of the last. More than one is an approximation, as large
            steps of ancestral sampling are: what is decoded together is independent. Positions and times are exact.
        mask_id, window, key, sampling: as in `ancestral_step`.
        step: number of the (first) event, an int or int64 () or (B,); the next step has number step + hits.

    Zheng et al., "Masked Diffusion Models are Secretly Time-Agnostic Masked Models…", 2024 (arXiv 2409.02908).

    >>> tokens, clock = torch.full((2, 3), 9), torch.zeros(2, dtype=torch.float64)
    >>> for step in range(3):
    ...     tokens, clock = first_hitting_step(torch.zeros(2, 3, 10), tokens, clock, mask_id=9, step=step)
    >>> bool((tokens != 9).all() and (clock < 0).all())
    True
    """
    state = Step("first_hitting_step", tokens, mask_id, step, window, key, generator)
    hit = _hit(state, clock, hits)
    return FirstHitting(state.reveal(logits, hit.where, sampling), hit.clock)


def hitting_steps(
    tokens: Tensor,
    times: Tensor,
    *,
    mask_id: int,
    schedule: Schedule = LINEAR,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Binned first-hitting: in which of T steps each masked position is decoded; int64 (B, L), −1 elsewhere.

    Each position draws its level u·m(times[0]) once and is decoded in the step whose interval holds it. The joint law
    of positions and steps is that of T calls of `ancestral_step`, but steps without an event need no model: decode with
    `reveal(logits, tokens, steps == k, …, step=k)`.

    Args:
        times: (T + 1,) descending from the start to the end; the last step decodes all that is left.
        tokens, mask_id, schedule, window, key: as in `ancestral_step`.

    >>> hitting_steps(torch.tensor([[9, 1, 9]]), torch.tensor([1.0, 0.0]), mask_id=9)
    tensor([[ 0, -1,  0]])
    """
    op = "hitting_steps"
    state = Step(op, tokens, mask_id, 1, window, key, generator)
    if not isinstance(times, Tensor) or times.dim() != 1 or times.numel() < 2:
        got = tuple(times.shape) if isinstance(times, Tensor) else type(times).__name__
        raise ValueError(f"{op}: times must have shape (T + 1,) with T ≥ 1, got {got}")
    if times.device.type == "cpu" and not bool((times.diff() <= 0).all()):
        raise ValueError(f"{op}: times must descend, got {times[0].item()} … {times[-1].item()}")
    levels = level_at(op, times[:-1].to(tokens.device, torch.float64), schedule)  # the last step ends at level 0
    u = _words.uniform(state.words(_words.CLOCK)) * levels[0]
    # In step k where m(t_{k+1}) ≤ u < m(t_k): as many of m(t_1) … m(t_{T−1}) exceed u as steps come before it.
    earlier = levels.numel() - 1 - torch.searchsorted(levels[1:].flip(0).contiguous(), u, right=True)
    return earlier.where(state.masked, -1)
