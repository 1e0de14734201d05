"""Token-critic sampling: what stays decoded is decided by scores from outside, and may be revoked."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _words
from ._step import Step
from .confidence import counts_of, ranks


def select_by_score(
    tokens: Tensor,
    scores: Tensor,
    num_masked: int | Tensor,
    *,
    mask_id: int,
    noise: float = 0.0,
    step: int | Tensor = 0,
    window: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mask the `num_masked` tokens of each sequence that a critic trusts least; all others stay, earlier or new.

    The text goes to the critic with every position filled (`reveal(logits, tokens, tokens == mask_id, …)`). Unlike
    confidence, its scores cover tokens decoded long ago, so they can be revoked.

    Args:
        tokens: int64 (B, L).
        scores: floating (B, L), larger is better; a NaN is the worst. Equal scores keep the lower position.
        num_masked: an int or int64 (B,), how many become [MASK], at most as many as take part.
        noise: scale of Gumbel noise added to the scores.
        window: bool (B, L), positions that take part: leave prompts out; frequency-adaptive sampling passes the
            positions that attention finds in regions of high frequency.
        mask_id, step, key: as in `ancestral_step`.

    Lezama et al., "Improved Masked Image Generation with Token-Critic", ECCV 2022; Lee et al., "Text-Conditioned
    Sampling Framework for Text-to-Image Generation with Masked Generative Models" (TCTS, FAS), ICCV 2023.

    >>> select_by_score(torch.tensor([[4, 5, 6]]), torch.tensor([[0.2, 0.9, 0.1]]), 1, mask_id=9)
    tensor([[4, 5, 9]])
    """
    op = "select_by_score"
    state = Step(op, tokens, mask_id, step, window, key, generator)
    if not isinstance(scores, Tensor) or scores.shape != tokens.shape or not scores.is_floating_point():
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{op}: scores must be floating (B, L), got {got}")
    if not noise >= 0:
        raise ValueError(f"{op}: noise must be at least 0, got {noise}")
    n = counts_of(op, "num_masked", num_masked, tokens).clamp(min=0)
    if noise:
        scores = scores + noise * _words.gumbel(state.words(_words.NOISE))
    rank, _ = ranks(scores, state.window)
    kept = state.window.sum(-1, keepdim=True) - n
    return tokens.masked_fill(state.window & (rank >= kept), mask_id)
