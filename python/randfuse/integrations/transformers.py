"""Speculative decoding of Hugging Face on the fused acceptance: one line, reversible.

    randfuse.integrations.transformers.enable()
    model.generate(**inputs, do_sample=True, assistant_model=assistant)

Transformers takes two softmaxes over all rows, and lets a coin of 0 pass a draft of probability 0; `speculative_accept`
reads the logits and does neither. The law of the text is that of the model, as it should be.
"""

from __future__ import annotations

import inspect

from torch import Tensor
from transformers.generation import utils

from ..ops import speculative_accept

_original = utils._speculative_sampling


def enable() -> None:
    """Let `generate(do_sample=True, assistant_model=…)` use `speculative_accept`, for all models of this process.

    Draws follow `torch.manual_seed`. Greedy decoding compares tokens and stays as it is, and so do calls with
    `assistant_ensemble_weight`, which is a lossy rule of its own. Enabling twice changes nothing.

    Raises:
        NotImplementedError: this version of transformers passes other arguments.
    """
    theirs, ours = (list(inspect.signature(f).parameters) for f in (_original, speculative_sampling))
    if theirs != ours:
        raise NotImplementedError(f"enable: transformers' _speculative_sampling must take {ours}, got {theirs}")
    utils._speculative_sampling = speculative_sampling


def disable() -> None:
    """Give acceptance back to transformers."""
    utils._speculative_sampling = _original


def speculative_sampling(
    candidate_input_ids: Tensor,
    candidate_logits: Tensor,
    candidate_length: int,
    new_logits: Tensor,
    assistant_ensemble_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`_speculative_sampling` of transformers: tokens (1, n + 1) of which n are drafts, and n."""
    if assistant_ensemble_weight is not None:
        return _original(candidate_input_ids, candidate_logits, candidate_length, new_logits, assistant_ensemble_weight)
    drafts = candidate_input_ids[:, candidate_input_ids.shape[1] - candidate_length :]
    accepted = speculative_accept(new_logits, drafts, candidate_logits.to(new_logits.dtype))
    n = accepted.num_accepted[0]
    return accepted.tokens[:, : n + 1], n
