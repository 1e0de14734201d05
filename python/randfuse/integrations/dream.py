"""Dream's sampler on exact sampling, with the signature of `DreamGenerationMixin._sample`.

    model._sample = types.MethodType(randfuse.integrations.dream._sample, model)

Unlike Dream's: probabilities are not rounded to bfloat16 before they are drawn from; each sequence has its own count of
masked positions, at least one of which is decoded in a step, and never a decoded one; [MASK] is never drawn.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..keys import draw_key
from ..masked_diffusion import ancestral_step, confidence_step

SCORES = {"maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"}


@torch.no_grad()
def _sample(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: Any,
    generation_tokens_hook_func: Any = lambda step, x, logits: x,
    generation_logits_hook_func: Any = lambda step, x, logits: logits,
    threshold: float = 0.9,
    key: Tensor | None = None,
) -> Any:
    """Fill `input_ids` up to `generation_config.max_length`; `alg` origin, maskgit_plus, topk_margin, entropy, or
    Fast-dLLM's confidence_threshold with `threshold`.

    Returns tokens, or with `return_dict_in_generate` an object with `sequences` and `history`.
    """
    config, op = generation_config, "_sample"
    if config.alg not in ("origin", "confidence_threshold", *SCORES):
        raise RuntimeError(f"{op}: alg must be origin, confidence_threshold, {', '.join(SCORES)}, got {config.alg!r}")
    mask_id, steps = config.mask_token_id, config.steps
    x = torch.nn.functional.pad(input_ids, (0, config.max_length - input_ids.shape[1]), value=mask_id)
    attention, positions = _attention(attention_mask, x.shape[1])
    top_p = config.top_p if config.top_p is not None and config.top_p < 1 else None
    options: dict[str, Any] = {"mask_id": mask_id, "temperature": config.temperature, "top_p": top_p}
    options |= {"top_k": config.top_k, "key": draw_key(x.device) if key is None else key}
    times = torch.linspace(1, config.eps, steps + 1, dtype=torch.float64).tolist()
    times[-1] = 0.0  # the last step decodes what is left
    x = generation_tokens_hook_func(None, x, None)
    history = []
    for i in range(steps):
        logits = self(x, attention, positions).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)  # position l is predicted at l − 1
        logits = generation_logits_hook_func(i, x, logits)
        t, s = times[i], times[i + 1]
        if config.alg == "origin":
            x = ancestral_step(logits, x, t, s, step=i, **options)
        elif config.alg == "confidence_threshold" and s > 0:
            x = confidence_step(logits, x, threshold=threshold, tempered=True, step=i, **options)
        else:
            left = (x == mask_id).sum(1)
            by = SCORES.get(config.alg, "probability")
            noise = config.alg_temp or 0.0
            count = (left * (1 - s / t)).long()
            x = confidence_step(logits, x, count=count, by=by, noise=noise, tempered=True, step=i, **options)  # type: ignore[arg-type]
        x = generation_tokens_hook_func(i, x, logits)
        history.append(x)
        if config.alg == "confidence_threshold" and not bool((x == mask_id).any()):
            break
    if config.return_dict_in_generate:
        return SimpleNamespace(sequences=x, history=history if config.output_history else None)
    return x


def _attention(mask: Tensor | None, length: int) -> tuple[Any, Tensor | None]:
    """Dream's two arguments: a (B, 1, L, L) mask and positions, or "full" where nothing is padded."""
    if mask is None or not bool((mask == 0).any()):
        return "full", None
    mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
    positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
    mask = mask.bool()
    return (mask.unsqueeze(1).unsqueeze(-2) & mask.unsqueeze(1).unsqueeze(-1)), positions
