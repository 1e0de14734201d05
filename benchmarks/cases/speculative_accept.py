"""`speculative_accept`: K drafts a request verified from raw logits; the bytes are those of all rows, read once.

Rows after the stop are not read, so the draft's law is next to the target's: nearly all drafts stand and all rows
must be read. "eager" is the rule in plain PyTorch: two softmaxes, gather, residual, one `multinomial`. "flashinfer" is
its sampler of chains with its softmaxes, which it asks for, and "vllm" the sampler of its current model runner, from
these logits as they are. Drafts without logits, and the modes that look at the target alone, have a case of their own,
speculative_accept_one_hot.
"""

from __future__ import annotations

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
    from flashinfer import sampling

    p, q = (sampling.softmax(inputs[name].flatten(0, 1)).view(inputs[name].shape) for name in ("x", "draft"))
    state = {name: inputs[name] for name in ("seed", "offset")}  # tensors: so a CUDA graph may hold the call
    return sampling.chain_speculative_sampling(q, inputs["ids32"], p, **state)[0]


def vllm(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Tokens, and how many of a request count."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    state = (inputs[name] for name in ("fed", "cu", "place", "slot", "row_slot", "row_place", "heat", "seeds"))
    return rejection_sample(inputs["x"].flatten(0, 1), inputs.get("draft"), *state, inputs["ids"].shape[1])


def engine_state(ids: Tensor) -> Inputs:
    """What calls of FlashInfer and vLLM get from their engines: request b has slot b, and its text k + 1 tokens."""
    (b, k), device = ids.shape, ids.device
    request, place = torch.arange(b, device=device), torch.arange(k + 1, device=device)
    return {
        "ids32": ids.int(),
        "seed": torch.ones(1, dtype=torch.int64, device=device),
        "offset": torch.zeros(1, dtype=torch.int64, device=device),
        "fed": torch.cat([ids[:, :1], ids], -1).flatten(),  # input tokens of the rows: draft j is that of row j + 1
        "cu": torch.arange(b + 1, dtype=torch.int32, device=device) * (k + 1),
        "place": place.repeat(b),
        "slot": request.int(),
        "row_slot": request.int().repeat_interleave(k + 1),
        "row_place": place.int().repeat(b),
        "heat": torch.ones(b, device=device),
        "seeds": request.clone(),
    }


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
        return {"x": target, "draft": draft, "ids": ids, **engine_state(ids)}

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        b, k, vocab = shape
        return Cost(read=b * (2 * k + 1) * vocab * itemsize, written=b * (k + 1) * 12, flops=0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.speculative_accept(inputs["x"], inputs["ids"], inputs["draft"], key=key).tokens

    def baselines(self) -> dict[str, Forward]:
        return {
            "eager": eager,
            "block": lambda i: randfuse.speculative_accept(i["x"], i["ids"], i["draft"], mode="block").tokens,
            "flashinfer": flashinfer,
            "vllm": vllm,
        }

    def floor(self, inputs: Inputs) -> Tensor:
        """One softmax over the same rows."""
        return torch.stack([inputs[n].softmax(-1).flatten(0, 1)[0, 0] for n in ("x", "draft")])

    def tokens(self, inputs: Inputs, key: Tensor) -> Tensor:
        with randfuse.use_backend("reference"):
            return self.randfuse(inputs, key)


CASE = SpeculativeAccept()
