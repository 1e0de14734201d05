"""Sampling guided by a value function without gradients (SVDD): several candidates, the value chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..keys import fold_in
from . import _words
from ._step import Logits, Sampling, Step
from .ancestral import unmask_probability
from .schedules import LINEAR, Schedule, level_at, times_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Selected(NamedTuple):
    """Chosen tokens (B, L), the candidate each sequence took (B,), and the values of all (M, B)."""

    tokens: Tensor
    candidate: Tensor
    values: Tensor


def ancestral_candidates(
    logits: Logits,
    tokens: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    num_candidates: int,
    *,
    mask_id: int,
    schedule: Schedule = LINEAR,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    **sampling: Unpack[Sampling],
) -> Tensor:
    """M independent ancestral steps (M, B, L) from one read of the logits; candidate 0 is what `ancestral_step` gives.

    Candidate m has its own coins, under the key fold_in(K, m) for m > 0, and draw m of every row that changes in any.
    Arguments as in `ancestral_step`.
    """
    state = Step("ancestral_candidates", tokens, mask_id, step, window, key, generator)
    return _candidates(state, logits, t, s, num_candidates, schedule, sampling)


def _candidates(
    state: Step,
    logits: Logits,
    t: float | Tensor,
    s: float | Tensor,
    count: int,
    schedule: Schedule,
    sampling: Sampling,
) -> Tensor:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{state.op}: num_candidates must be a positive int, got {count!r}")
    tokens, keys = state.tokens, state.keys
    m_t, m_s = (level_at(state.op, time, schedule) for time in times_of(state.op, t, s, tokens))
    p, length = unmask_probability(m_t, m_s), tokens.shape[1]
    changed = []
    for m in range(count):
        own = keys if m == 0 else fold_in(keys, m)
        changed.append(state.masked & _words.coin(_words.words(own, _words.UNMASK, state.step, length), p))
    where = torch.stack(changed)
    rows = where.any(0).flatten().nonzero().squeeze(-1)
    drawn = state.draw(logits, rows, sampling, count).T
    flat = tokens.flatten().repeat(count, 1)
    flat[:, rows] = drawn.where(where.flatten(1)[:, rows], flat[:, rows])
    return flat.view_as(where)


def select_by_value(
    logits: Logits,
    tokens: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    value: Callable[[Tensor], Tensor],
    *,
    num_candidates: int,
    mask_id: int,
    alpha: float = 0.0,
    schedule: Schedule = LINEAR,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    **sampling: Unpack[Sampling],
) -> Selected:
    """One ancestral step steered by a value: of M candidates one by softmax(value / alpha), or the best (alpha = 0).

    Args:
        value: called with candidates int64 (M, B, L), gives their values (M, B), larger is better; for rewards of
            finished texts, let it complete them first (SVDD-PM). Rewards may be black boxes: no gradient is taken.
        alpha: temperature ≥ 0; equal values go to the first candidate where it is 0.
        logits, tokens, t, s, mask_id, schedule, step, window, key, sampling: as in `ancestral_step`.

    Li et al., "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding",
    2024.

    >>> few = lambda x: -(x == 1).sum(-1).float()
    >>> out = select_by_value(torch.zeros(1, 8, 10), torch.full((1, 8), 9), 1.0, 0.0, few, num_candidates=32, mask_id=9)
    >>> bool(out.values[out.candidate] == out.values.max())
    True
    """
    op = "select_by_value"
    state = Step(op, tokens, mask_id, step, window, key, generator)
    if not alpha >= 0:
        raise ValueError(f"{op}: alpha must be at least 0, got {alpha}")
    candidates = _candidates(state, logits, t, s, num_candidates, schedule, sampling)
    values = value(candidates)
    got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if got != tuple(candidates.shape[:2]):
        raise ValueError(f"{op}: value must give shape (M, B) = {tuple(candidates.shape[:2])}, got {got}")
    score = values.double()
    if alpha:
        score = score / alpha + _words.gumbel(_words.words(state.keys, _words.NOISE, state.step, num_candidates)).T
    index = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(0)
    chosen = candidates.gather(0, index.reshape(1, -1, 1).expand(1, *tokens.shape)).squeeze(0)
    return Selected(chosen, index, values)
