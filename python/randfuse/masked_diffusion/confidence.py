"""Confidence-ranked decoding: all masked positions are drawn, the surest of them are kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from .. import _sampling
from ..ops.categorical_sample import CategoricalStats, categorical_sample, categorical_sample_with_stats
from . import _words
from ._step import Logits, Sampling, Step, logit_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Score = Literal["probability", "margin", "entropy", "random"]


def confidence_step(
    logits: Logits,
    tokens: Tensor,
    *,
    mask_id: int,
    count: int | Tensor | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    entropy_budget: float | None = None,
    by: Score = "probability",
    noise: float = 0.0,
    noise_on: Literal["probability", "logprob"] = "probability",
    tempered: bool = False,
    defer: Tensor | None = None,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    **sampling: Unpack[Sampling],
) -> Tensor:
    """Draw a token for every masked position and decode the positions that the model is surest of.

    Which ones: the `count` surest; or all that reach `threshold`; or the n surest while (n + 1)(1 − p) of the n-th is
    at most `factor`; or the surest as long as the entropies of those before sum to at most `entropy_budget`. Always at
    least one of each sequence that has a masked position, never one that is decoded; equal scores go to the lowest
    position. Ranks are those of log-odds, which tell 1 − 1e-12 from 1 − 1e-11; probabilities saturate, and ranking them
    decodes from left to right.

    * LLaDA low_confidence and random: `count` from `transfer_counts`, `by="probability"` or "random".
    * Fast-dLLM: `threshold=0.9`, or `factor=1.0`.
    * Dream maskgit_plus, topk_margin, entropy: `by="probability"`, "margin", "entropy", `tempered=True`,
      `noise=alg_temp`.
    * MaskGIT: `count` from `maskgit_count`, `tempered=True`, `noise=τ(1 − r)`, `noise_on="logprob"`.
    * EB-Sampler: `entropy_budget=γ`, `by="entropy"`.

    Args:
        logits, tokens, mask_id, step, key, sampling: as in `ancestral_step`. Drawing all masked positions of the
            window needs their logits; on a GPU the whole batch is drawn, since counting would wait for the device.
        count: how many a sequence, an int or int64 (B,); less than 1 counts as 1, more than there are as all.
        threshold: least probability of the token drawn; for "margin" least p₁ − p₂, for "entropy" largest entropy.
        factor: of Fast-dLLM's bound on how far n independent draws are from a joint one; for "probability".
        entropy_budget: nats.
        by: p of the token drawn; p₁ − p₂ of the two likeliest; minus the entropy; or a random word.
        noise: scale of Gumbel noise added to p, p₁ − p₂ or −entropy; with Dream's alg_temp this is sampling without
            replacement from softmax(score / alg_temp). `noise_on="logprob"` adds it to log p instead.
        tempered: rank by the law that was drawn from; otherwise by softmax of the logits as they are, as LLaDA and
            Fast-dLLM do: a tempered confidence is 1 nearly everywhere. The second law costs a second read.
        defer: int64 (E,), tokens that rank last when drawn, as LLaDA does with the end of text.
        window: bool (B, L), the block that is decoded.

    Nie et al., "Large Language Diffusion Models" (LLaDA), 2025; Ye et al., "Dream 7B", 2025; Wu et al., "Fast-dLLM",
    2025; Chang et al., "MaskGIT", CVPR 2022; Ben-Hamu et al., "Accelerated Sampling … via Entropy Bounded Unmasking",
    2025.

    >>> logits = torch.tensor([[[9.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 5.0]]])
    >>> confidence_step(logits, torch.full((1, 3), 2), mask_id=2, count=1, temperature=0.0)
    tensor([[0, 2, 2]])
    """
    op = "confidence_step"
    state = Step(op, tokens, mask_id, step, window, key, generator)
    if sum(rule is not None for rule in (count, threshold, factor, entropy_budget)) != 1:
        raise ValueError(f"{op}: exactly one of count, threshold, factor and entropy_budget must be given")
    if by not in get_args(Score):
        raise ValueError(f"{op}: by must be one of {', '.join(get_args(Score))}, got {by!r}")
    if threshold is not None and (by == "random" or noise):
        raise ValueError(f"{op}: threshold must be used with a score of the model and without noise")
    if factor is not None and not (factor > 0 and by == "probability" and not noise):
        raise ValueError(f"{op}: factor must be positive, used with by='probability' and without noise, got {factor}")
    if entropy_budget is not None and not entropy_budget >= 0:
        raise ValueError(f"{op}: entropy_budget must be at least 0, got {entropy_budget}")
    if not noise >= 0 or (noise and by == "random"):
        raise ValueError(f"{op}: noise must be at least 0, and 0 with by='random', got {noise}")
    if noise_on not in ("probability", "logprob"):
        raise ValueError(f"{op}: noise_on must be 'probability' or 'logprob', got {noise_on!r}")
    if defer is not None:
        _sampling.integers(op, "defer", defer, torch.int64, tokens.device)
    rows = _rows(state)
    if rows.numel() == 0:
        return tokens.clone()
    drawn, facts = _draw(state, logits, rows, sampling, tempered)
    score, entropy = (
        _spread(state, rows, fact) for fact in (_score(facts, by, noise > 0, noise_on), facts.entropy.double())
    )
    if by == "random":
        score = _words.uniform(state.words(_words.NOISE))
    elif noise:
        score = score + noise * _words.gumbel(state.words(_words.NOISE))
    if defer is not None:
        score = score.masked_fill(torch.isin(_spread(state, rows, drawn), defer), -torch.inf)
    rank, order = ranks(score, state.masked)
    chosen = torch.zeros_like(state.masked)
    if count is not None:
        chosen = rank < counts_of(op, "count", count, tokens).clamp(min=1)
    elif threshold is not None:
        chosen = (score >= _least_score(op, by, threshold)) | (rank == 0)
    elif factor is not None:  # p ≥ 1 − factor / (n + 1) as log-odds, n = rank + 1
        chosen = (score >= ((rank.double() + 2) / factor - 1).clamp(min=0).log()) | (rank == 0)
    elif entropy_budget is not None:
        spent = entropy.where(state.masked, 0.0).gather(1, order).cumsum(1)
        before = torch.cat([torch.zeros_like(spent[:, :1]), spent[:, :-1]], 1)
        chosen = chosen.scatter(1, order, before <= entropy_budget)
    return torch.where(chosen & state.masked, _spread(state, rows, drawn), tokens)


def transfer_counts(masked: Tensor, steps: int) -> Tensor:
    """LLaDA's share of each step: counts (B,) of masked positions -> (B, steps), as even as can be, first ones larger.

    >>> transfer_counts(torch.tensor([7]), 3)
    tensor([[3, 2, 2]])
    """
    if steps < 1:
        raise ValueError(f"transfer_counts: steps must be positive, got {steps}")
    n = masked.unsqueeze(-1)
    return n // steps + (torch.arange(steps, device=masked.device) < n % steps)


def maskgit_count(masked: Tensor, initial: Tensor, step: int, steps: int) -> Tensor:
    """How many of `masked` (B,) positions MaskGIT decodes so that cos(π(step + 1)/(2·steps)) of `initial` (B,) stay.

    >>> maskgit_count(torch.tensor([8]), torch.tensor([8]), 0, 4)
    tensor([1])
    """
    if step + 1 >= steps:
        return masked
    stay = (math.cos(math.pi / 2 * (step + 1) / steps) * initial).floor().long()
    return masked - stay.minimum(masked - 1).clamp(min=1)


def ranks(score: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each position (0 is the best) and the positions by rank; candidates first, equal scores by position.

    A NaN is the worst score. One sort decides both: no candidate is below the least finite number, no other above.
    """
    worst = torch.finfo(score.dtype).min
    held = score.nan_to_num(nan=worst, posinf=torch.inf, neginf=worst).where(candidates, -torch.inf)
    order = held.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place), order


def counts_of(op: str, name: str, count: int | Tensor, tokens: Tensor) -> Tensor:
    """An int or int64 (B,) as (1 or B, 1)."""
    if isinstance(count, bool) or not isinstance(count, (int, Tensor)):
        raise TypeError(f"{op}: {name} must be an int or an int64 Tensor, got {type(count).__name__}")
    if not isinstance(count, Tensor):
        return torch.full((1, 1), count, device=tokens.device)
    if count.dtype != torch.int64 or count.shape != tokens.shape[:1]:
        raise ValueError(
            f"{op}: {name} must be int64 (B,) = ({tokens.shape[0]},), got {count.dtype} {tuple(count.shape)}"
        )
    return count.unsqueeze(-1)


def _rows(state: Step) -> Tensor:
    """What is drawn: on a CPU the masked rows, which are known for nothing; a GPU would have to be waited for, and a
    compiled graph has no place for a size that is not known."""
    if state.tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        return state.masked.flatten().nonzero().squeeze(-1)
    return torch.arange(state.tokens.numel(), device=state.tokens.device)


def _draw(
    state: Step, logits: Logits, rows: Tensor, sampling: Sampling, tempered: bool
) -> tuple[Tensor, CategoricalStats]:
    """Tokens of `rows` and the facts to rank them by; log_odds is the token's, whichever law it was drawn from."""
    x, arguments = state.arguments(logits, rows, sampling)
    temperature = sampling.get("temperature", 1.0)
    filters = any(sampling.get(name) is not None for name in ("top_k", "top_p", "min_p"))
    plain = not isinstance(temperature, Tensor) and temperature in (0, 1) and not filters
    if tempered or plain:
        facts = categorical_sample_with_stats(x, **arguments)
        return facts.tokens, facts
    drawn = categorical_sample(x, **arguments)
    arguments |= {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
    facts = categorical_sample_with_stats(x, **arguments)  # of the likeliest tokens, at temperature 1
    value, guide = logit_of(x, rows, drawn), arguments.get("uncond_logits")
    if guide is not None:
        base = logit_of(guide, rows, drawn)
        value = base + (sampling.get("cfg_scale", 0.0) + 1) * (value - base)
    logprob = value - facts.logsumexp
    # The likeliest token's log-odds come from its rivals; of any other p ≤ 1/2, where 1 − p is accurate.
    log_odds = facts.log_odds.where(drawn == facts.tokens, logprob - torch.log1p(-logprob.exp()))
    return drawn, facts._replace(tokens=drawn, logprob=logprob, log_odds=log_odds)


def _score(facts: CategoricalStats, by: str, noisy: bool, noise_on: str) -> Tensor:
    """float64 (R,): never saturated where it is ranked alone, the published quantity where noise is added."""
    if by == "entropy":
        return -facts.entropy.double()
    if by == "margin":
        return (facts.margin.double() / 2).tanh() if noisy else facts.margin.double()
    if noisy:
        return facts.logprob.double() if noise_on == "logprob" else facts.logprob.double().exp()
    return facts.log_odds.double()


def _least_score(op: str, by: str, threshold: float) -> float:
    most = math.inf if by == "entropy" else 1
    if not 0 <= threshold <= most:
        raise ValueError(f"{op}: threshold must be in [0, {most}], got {threshold}")
    if by == "entropy":
        return -threshold
    if threshold in (0, 1):
        return math.inf if threshold else -math.inf
    if by == "margin":
        return 2 * math.atanh(threshold)
    return math.log(threshold / (1 - threshold))


def _spread(state: Step, rows: Tensor, values: Tensor) -> Tensor:
    """Values (R,) of rows as (B, L), 0 elsewhere."""
    return values.new_zeros(state.tokens.numel()).index_put((rows,), values).view_as(state.tokens)
