"""LLaDA's `generate.py` on exact sampling: its functions under their own names and signatures.

    from randfuse.integrations.llada import generate        # instead of LLaDA's
    x0 = sample_tokens(logits, temperature)                 # instead of argmax(add_gumbel_noise(logits, temperature))

LLaDA draws with float64 Gumbel noise, 120 bytes of traffic a logit; here masked rows of the active block are read once
or twice. Unlike there, [MASK] itself is never drawn, confidences do not saturate (LLaDA's softmax is bfloat16), and
equal ones go to the lowest position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import masked_diffusion
from ..ops import categorical_sample

EOS, EOT = 126081, 126348  # of LLaDA's tokenizer


def sample_tokens(
    logits: Tensor, temperature: float, *, key: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """`torch.argmax(add_gumbel_noise(logits, temperature), -1)`: tokens (…) of softmax(logits / temperature)."""
    return categorical_sample(logits, temperature, key=key, generator=generator)


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    threshold: float | None = None,
    factor: float | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """LLaDA's `generate` (B prompts of one length, padded on the left), with Fast-dLLM's parallel decoding.

    Args:
        model: x, attention_mask -> an object with logits (B, L, V).
        prompt: int64 (B, P).
        threshold: decode all of a block that reach this probability, as many steps as it takes.
        factor: the same with Fast-dLLM's factor rule. Without either, `steps` says how many are decoded in each.
        key, generator: as everywhere; the other arguments are LLaDA's.

    Returns:
        int64 (B, P + gen_length).
    """
    op = "generate"
    rules = {"low_confidence": "confidence", "random": "random"}
    if remasking not in rules:
        raise NotImplementedError(f"{op}: remasking must be one of {', '.join(rules)}, got {remasking!r}")
    if gen_length % block_length or steps % (gen_length // block_length):
        raise ValueError(f"{op}: gen_length must be divisible by block_length, and steps by the number of blocks")
    x = torch.nn.functional.pad(prompt, (0, gen_length), value=mask_id)
    if attention_mask is not None:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, gen_length), value=1)
    given = x != mask_id

    def logits_of(tokens: Tensor, rows: Tensor) -> Tensor:
        """Guidance is worked out for the rows that are drawn, and in float32."""
        if cfg_scale <= 0:
            return model(tokens, attention_mask=attention_mask).logits.flatten(0, 1)[rows]
        both = torch.cat([tokens, tokens.masked_fill(given, mask_id)])
        mask = None if attention_mask is None else attention_mask.repeat(2, 1)
        l, u = (half.flatten(0, 1)[rows].float() for half in model(both, attention_mask=mask).logits.chunk(2))
        return u + (cfg_scale + 1) * (l - u)

    special = torch.tensor([EOS, EOT], device=x.device)
    return masked_diffusion.generate(
        logits_of,
        x,
        mask_id=mask_id,
        method=rules[remasking],
        steps=steps,
        block_length=block_length,
        temperature=temperature,
        exclude=special[:1] if logits_eos_inf else None,
        options={"threshold": threshold, "factor": factor, "defer": special if confidence_eos_eot_inf else None},
        key=key,
        generator=generator,
    )
