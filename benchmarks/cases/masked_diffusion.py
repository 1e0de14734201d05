"""`masked_diffusion`: a sampling step of T = 1000 steps, from logits of all positions to the next text.

"eager" is MDLM's `_ddpm_update` after its network: SUBS parameterisation and float32 Gumbel-max over [MASK] and all
tokens of all rows. Half of the positions are masked, and one in 500 of these changes: the least traffic is one read of
these rows.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
from randfuse.bench.case import Cost, Forward, Inputs, SamplerCase, Shape
from torch import Tensor

T, S = 0.5, 0.499  # the middle of 1000 steps: 1 in 500 of the masked positions changes


def mdlm(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    """`_subs_parameterization` and `_ddpm_update` as published (float64: as ReMDM corrects it)."""
    logits, x = inputs["x"].float(), inputs["text"]
    mask = logits.shape[-1] - 1
    logits = logits.clone()
    logits[:, :, mask] += -1e6
    logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    kept = x != mask
    logits[kept] = -1e6
    logits[kept, x[kept]] = 0
    q = logits.exp() * (T - S)
    q[:, :, mask] = S
    q = q.to(dtype)
    noise = 1e-10 - (torch.rand_like(q) + 1e-10).log()
    drawn = (q / noise).argmax(dim=-1)
    return torch.where(kept, x, drawn)


class MaskedDiffusion(SamplerCase):
    op = "masked_diffusion"
    letters = "batch,length,vocab"
    shapes: ClassVar = {
        "smoke": {"cpu": ((2, 64, 1000),), "cuda": ((2, 256, 50258),)},
        "default": {"cpu": ((1, 1024, 50258),), "cuda": ((8, 1024, 50258),)},
        "full": {"cpu": ((1, 1024, 50258),), "cuda": ((8, 1024, 50258), (1, 1024, 126464))},
    }

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        batch, length, vocab = shape
        text = torch.full((batch, length), vocab - 1, device=device).masked_fill(
            torch.rand(batch, length, device=device) < 0.5, 0
        )
        return {"x": (torch.randn(*shape, device=device) * 3).to(dtype), "text": text}

    def rows(self, shape: Shape) -> int:
        """Changing rows on average."""
        return max(round(shape[0] * shape[1] * 0.5 * (T - S) / T), 1)

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        batch, length, vocab = shape
        return Cost(read=self.rows(shape) * vocab * itemsize + batch * length * 8, written=batch * length * 8, flops=0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        mask = inputs["x"].shape[-1] - 1
        return randfuse.masked_diffusion.ancestral_step(inputs["x"], inputs["text"], T, S, mask_id=mask, key=key)

    def baselines(self) -> dict[str, Forward]:
        return {"eager": mdlm, "float64": lambda inputs: mdlm(inputs, torch.float64)}

    def floor(self, inputs: Inputs) -> Tensor:
        """The largest logits of as many rows as change, and a copy of the text."""
        best = inputs["x"].flatten(0, 1)[: self.rows(tuple(inputs["x"].shape))].argmax(-1)
        out = inputs["text"].clone()
        out.view(-1)[: len(best)] = best
        return out

    def tokens(self, inputs: Inputs, key: Tensor) -> Tensor:
        with randfuse.use_backend("reference"):
            return self.randfuse(inputs, key)


CASE = MaskedDiffusion()
