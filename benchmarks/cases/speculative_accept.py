"""`speculative_accept`: K drafts a request verified from raw logits; the bytes are those of all rows, read once.

Rows after the stop are not read, so the draft's law is next to the target's: nearly all drafts stand and all rows
must be read. "eager" is the rule in plain PyTorch: two softmaxes, gather, residual, one `multinomial`. Drafts without
logits, and the modes that look at the target alone, have a case of their own, speculative_accept_one_hot.
"""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import randfuse
import torch
from randfuse.bench.case import Cost, Forward, Inputs, SamplerCase, Shape
from torch import Tensor


def eager(inputs: Inputs) -> Tensor:
    target, ids = inputs["x"], inputs["ids"]
    b, k = ids.shape
    p, q = target.float().softmax(-1), inputs["draft"].float().softmax(-1)
    px, qx = (law[:, :k].gather(-1, ids.unsqueeze(-1)).squeeze(-1) for law in (p, q))
    stands = (torch.rand_like(px) * qx < px).long().cumprod(-1)
    stop, request = stands.sum(-1), torch.arange(b, device=ids.device)
    rest = p[request, stop]
    left = (rest - q[request, stop.clamp(max=k - 1)]).clamp(min=0)
    rest = torch.where(((stop < k) & (left.sum(-1) > 0)).unsqueeze(-1), left, rest)
    tokens = torch.cat([ids.where(stands.bool(), -1), torch.full_like(ids[:, :1], -1)], -1)
    return tokens.scatter(1, stop.unsqueeze(-1), torch.multinomial(rest, 1))


def flashinfer(inputs: Inputs) -> Tensor:
    """FlashInfer's kernel and the softmaxes that it asks for."""
    from flashinfer.sampling import chain_speculative_sampling

    q, p = inputs["draft"].float().softmax(-1), inputs["x"].float().softmax(-1)
    return chain_speculative_sampling(q, inputs["ids"].int(), p)[0]


ACCEPT_SHAPES = {
    "smoke": {"cpu": ((4, 4, 50257),), "cuda": ((16, 4, 50257),)},
    "default": {"cpu": ((16, 4, 50257),), "cuda": ((1, 4, 151936), (64, 4, 151936), (256, 4, 151936))},
    "full": {
        "cpu": ((1, 4, 151936), (16, 4, 50257), (16, 7, 151936)),
        "cuda": ((1, 4, 151936), (8, 4, 151936), (64, 4, 151936), (64, 7, 151936), (256, 4, 151936)),
    },
}


class SpeculativeAccept(SamplerCase):
    op = "speculative_accept"
    letters = "requests,drafts,vocab"
    shapes: ClassVar = ACCEPT_SHAPES

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        b, k, vocab = shape
        target = (torch.randn(b, k + 1, vocab, device=device) * 3).to(dtype)
        draft = (target[:, :k].float() + torch.randn(b, k, vocab, device=device) * 0.01).to(dtype)
        ids = randfuse.categorical_sample(draft, key=randfuse.key(0, device))
        return {"x": target, "draft": draft, "ids": ids}

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        b, k, vocab = shape
        return Cost(read=b * (2 * k + 1) * vocab * itemsize, written=b * (k + 1) * 12, flops=0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.speculative_accept(inputs["x"], inputs["ids"], inputs["draft"], key=key).tokens

    def baselines(self) -> dict[str, Forward]:
        found: dict[str, Forward] = {
            "eager": eager,
            "block": lambda i: randfuse.speculative_accept(i["x"], i["ids"], i["draft"], mode="block").tokens,
        }
        if torch.cuda.is_available() and importlib.util.find_spec("flashinfer") is not None:
            found["flashinfer"] = flashinfer
        return found

    def floor(self, inputs: Inputs) -> Tensor:
        """One softmax over the same rows."""
        return torch.stack([inputs[n].softmax(-1).flatten(0, 1)[0, 0] for n in ("x", "draft")])

    def tokens(self, inputs: Inputs, key: Tensor) -> Tensor:
        with randfuse.use_backend("reference"):
            return self.randfuse(inputs, key)


CASE = SpeculativeAccept()
