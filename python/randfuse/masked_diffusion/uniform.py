"""Uniform-state diffusion (UDLM): tokens move to other tokens, there is no [MASK]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.categorical_sample import categorical_sample_with_stats
from . import _words
from ._step import Logits, Step, logit_of, none_of
from .schedules import LINEAR, Schedule, level_at, times_of

if TYPE_CHECKING:
    from typing import Literal


def uniform_step(
    logits: Logits,
    tokens: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    *,
    vocab: int,
    temperature: float | Tensor = 1.0,
    method: Literal["cdf", "race"] = "cdf",
    schedule: Schedule = LINEAR,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One step from t to s < t of uniform-state diffusion; only rows that may change are read.

    The posterior is a mixture of three, with a = α_t/α_s and D = α_t·V·x_θ(x_t) + 1 − α_t:

        (α_s − α_t)/D : a draw from x_θ;   (1 − a)(1 − α_s)/D : a uniform token;   else x_t stays.

    D ≥ 1 − α_t whatever the network says, so one 64-bit coin against the bound picks the rows that may change, about
    one in T of T steps; there the same coin is compared with the exact probabilities. Plain code builds two one-hot
    tensors of N×V and samples every row.

    Args:
        logits: as in `ancestral_step`, of x_θ.
        tokens: int64 (B, L), ids below vocab.
        vocab: V.
        t, s, schedule, step, window, key: as in `ancestral_step`.
        temperature, method: of x_θ, as in `randfuse.categorical_sample`; a number, or () or (B, L).

    Schiff et al., "Simple Guidance Mechanisms for Discrete Diffusion Models" (UDLM), ICLR 2025.

    >>> x = torch.zeros(1, 4, dtype=torch.int64)
    >>> out = uniform_step(torch.tensor([0.0, 0.0, 90.0]).expand(1, 4, 3), x, 1.0, 0.0, vocab=3)
    >>> out.tolist()
    [[2, 2, 2, 2]]
    """
    op = "uniform_step"
    state = Step(op, tokens, None, step, window, key, generator)
    m_t, m_s = (level_at(op, time, schedule) for time in times_of(op, t, s, tokens))
    drawn = m_t - m_s  # α_s − α_t
    noise = (m_t - m_s) / (1 - m_s) * m_s  # (1 − a)(1 − α_s)
    word = state.words(_words.UNMASK)
    bound = torch.where(m_t > 0, (drawn + noise) / m_t, 0.0).clamp(max=1)
    rows = (state.window & _words.coin(word, bound)).flatten().nonzero().squeeze(-1)
    if none_of(rows):
        return tokens.clone()
    x, arguments = state.arguments(logits, rows, {"temperature": temperature, "method": method})
    if x.shape[-1] != vocab:
        raise ValueError(f"{op}: logits must have V = vocab = {vocab} columns, got {x.shape[-1]}")
    facts = categorical_sample_with_stats(x, **arguments)
    here = tokens.flatten()[rows]
    warm = torch.as_tensor(temperature, dtype=torch.float64, device=tokens.device).expand(tokens.shape).flatten()[rows]
    p_here = (logit_of(x, rows, here) / warm - facts.logsumexp).exp().where(warm > 0, (here == facts.tokens).double())
    m_t, drawn, noise = (at.expand(tokens.shape).flatten()[rows] for at in (m_t, drawn, noise))
    whole = (1 - m_t) * vocab * p_here + m_t  # D
    word, other = word.flatten()[rows], state.words(_words.NOISE).flatten()[rows]
    anything = _words.index_below(other, torch.full_like(other, vocab))
    moved = torch.where(_words.coin(word, drawn / whole), facts.tokens, anything)
    return state.put(rows, moved.where(_words.coin(word, (drawn + noise) / whole), here))
