"""Remasking steps: decoded tokens may be masked again, so that later ones can correct earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..ops.categorical_sample import categorical_sample_with_stats
from ._step import Logits, Sampling, Step, none_of
from ._words import REMASK, UNMASK
from .ancestral import unmask_probability
from .schedules import LINEAR, Schedule, level_at, times_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Variant = Literal["cap", "rescale", "conf", "loop", "forward-backward", "dfm"]
ETA = {"cap": 0.008, "rescale": 0.015, "loop": 0.02}  # the published scripts' strengths


class Remasked(NamedTuple):
    """Tokens after the step and, for "conf", the probabilities that decoded tokens had when they were drawn."""

    tokens: Tensor
    confidence: Tensor | None


def remask_step(
    logits: Logits,
    tokens: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    *,
    mask_id: int,
    variant: Variant = "cap",
    eta: float | None = None,
    confidence: Tensor | None = None,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
    schedule: Schedule = LINEAR,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    **sampling: Unpack[Sampling],
) -> Remasked:
    """One step of ReMDM or of its relatives: masked positions may be decoded, decoded ones masked.

    With σ the chance of being masked again, a masked position is decoded with probability
    (α_s − (1 − σ)α_t) / (1 − α_t). Both coins are fresh at every step; neither reads logits, so only rows that are
    decoded are sampled, and a step that decodes nothing needs no model.

    * "cap": σ = min(eta, σ_max) with σ_max = min(1, (1 − α_s)/α_t); "rescale": σ = eta·σ_max.
    * "conf": σ = σ_max·softmax(−p) over the decoded positions of a sequence, p being the probability each had when it
      was drawn; masked positions have σ = 0. Pass the returned confidence to the next step.
    * "loop": MDLM for t > t_on and t ≤ t_off, with α rising to alpha_on and from it; between them α rests and σ = eta.
    * "forward-backward": σ = (α_s − α_t)/α_t, but not above σ_max, where a masked position would be kept with a
      negative probability. "dfm": the corrector of discrete flow matching, a = 1 + 10·t^¼(1 − t)^¼ and b = a − 1:
      decoded with a(α_s − α_t)/(1 − α_t), masked with b(α_s/α_t − 1); take steps as `dfm_step_size` says.

    All but "conf" keep P(masked at s) = 1 − α_s exactly (for "loop": of its own α).

    Args:
        logits, tokens, t, s, mask_id, schedule, step, key, sampling: as in `ancestral_step`.
        variant, eta, t_on, t_off, alpha_on: see above; eta None is the published script's, 0 is MDLM.
        confidence: floating (B, L) from the step before, for "conf"; None begins without decoded tokens.
        window: bool (B, L), positions that take part. Leave prompts out: all that is decoded may be masked again.

    Wang et al., "Remasking Discrete Diffusion Models with Inference-Time Scaling", 2025; Campbell et al. 2022
    (forward-backward); Gat et al., "Discrete Flow Matching", NeurIPS 2024.

    >>> tokens = torch.zeros(1, 1000, dtype=torch.int64)
    >>> out = remask_step(torch.zeros(1, 1000, 4), tokens, 0.5, 0.4, mask_id=3, variant="cap", eta=0.1)
    >>> 50 < int((out.tokens == 3).sum()) < 150
    True
    """
    op = "remask_step"
    state = Step(op, tokens, mask_id, step, window, key, generator)
    if variant not in get_args(Variant):
        raise ValueError(f"{op}: variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
    eta = ETA.get(variant, 0.0) if eta is None else eta
    for name, value in (("eta", eta), ("alpha_on", alpha_on)):
        if not 0 <= value <= 1:
            raise ValueError(f"{op}: {name} must be in [0, 1], got {value}")
    if not 0 < t_off <= t_on < 1:
        raise ValueError(f"{op}: t_off and t_on must be ordered inside (0, 1), got {t_off} and {t_on}")
    if confidence is not None and (confidence.shape != tokens.shape or not confidence.is_floating_point()):
        raise ValueError(f"{op}: confidence must be floating (B, L), got {confidence.dtype} {tuple(confidence.shape)}")
    held = tokens.new_zeros(tokens.shape, dtype=torch.float32) if confidence is None else confidence
    t, s = times_of(op, t, s, tokens)
    unmask, remask = _rates(state, t, s, variant, eta, held, t_on, t_off, alpha_on, schedule)
    decoded = state.window & (tokens != mask_id)
    again = decoded & state.coins(REMASK, remask)
    shown = state.masked & state.coins(UNMASK, unmask)
    if variant != "conf":
        return Remasked(state.reveal(logits, shown, sampling).masked_fill(again, mask_id), None)
    rows = shown.flatten().nonzero().squeeze(-1)
    if not none_of(rows):
        x, arguments = state.arguments(logits, rows, sampling)
        facts = categorical_sample_with_stats(x, **arguments)
        tokens = state.put(rows, facts.tokens)
        held = held.flatten().index_put((rows,), facts.logprob.exp().to(held.dtype)).view_as(held)
    return Remasked(tokens.masked_fill(again, mask_id), held.masked_fill(again, 0.0))


def _rates(
    state: Step,
    t: Tensor,
    s: Tensor,
    variant: str,
    eta: float,
    confidence: Tensor,
    t_on: float,
    t_off: float,
    alpha_on: float,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """Probabilities (B or 1, L or 1) of decoding a masked position and of masking a decoded one."""
    if variant == "loop":
        m_t, m_s = (_loop_level(time, t_on, t_off, alpha_on) for time in (t, s))
    else:
        m_t, m_s = (level_at(state.op, time, schedule) for time in (t, s))
    alpha_t = 1 - m_t
    most = torch.where(m_s > 0, (m_s / alpha_t).clamp(max=1), 0.0)  # σ_max; nothing is masked again at the end
    if variant == "dfm":
        b = 10 * (t * (1 - t)) ** 0.25
        ends = (s == 0) | (alpha_t == 0)  # no corrector there: nothing is left to decode, or to mask
        remask = torch.where(ends, 0.0, b * (m_t - m_s) / alpha_t)
        unmask = unmask_probability(m_t, m_s) * torch.where(ends, 1.0, 1 + b)
        return unmask.clamp(max=1), remask.clamp(max=1)
    if variant == "conf":
        decoded = state.window & ~state.masked
        share = torch.where(decoded, -confidence.double(), -torch.inf).softmax(-1)
        return unmask_probability(m_t, m_s), most * share.where(decoded, 0.0)  # no token decoded: softmax is NaN
    sigma = {
        "cap": lambda: torch.full_like(most, eta),
        "rescale": lambda: eta * most,
        "loop": lambda: eta * ((t > t_off) & (t <= t_on)).double(),
        "forward-backward": lambda: ((m_t - m_s) / alpha_t).nan_to_num(nan=1.0),
    }[variant]().minimum(most)
    return torch.where(m_t > 0, (m_t - m_s + sigma * alpha_t) / m_t, 1.0), sigma


def _loop_level(t: Tensor, t_on: float, t_off: float, alpha_on: float) -> Tensor:
    """1 − α of the three phases."""
    rising, last = 1 - (1 - t) * alpha_on / (1 - t_on), t * (1 - alpha_on) / t_off
    return torch.where(t > t_on, rising, torch.where(t <= t_off, last, 1 - alpha_on))


def dfm_step_size(t: float, steps: int) -> float:
    """The largest step ≤ 1/steps from time t, 0 < t ≤ 1, that keeps both probabilities of "dfm" (linear schedule) ≤ 1.

    >>> dfm_step_size(1.0, 100)
    0.01
    """
    b = 10 * (t * (1 - t)) ** 0.25
    return 1 / steps if t == 1 else min(1 / steps, 1 / ((1 + b) / t + b / (1 - t)))
