"""`speculative_accept` of drafts without logits: the target's rows are all there is to read, each once.

A draft has p = 0.999, so nearly all stand, in every mode, and all rows must be read. "eager" is the rule in plain
PyTorch: a softmax, gather, the draft's token zeroed in the row of the stop, one `multinomial`. "match" and "typical"
are randfuse's other modes, "top_k" and "top_p" its filters, next to eager ones by `topk` and `sort`. "vllm" is the
sampler of its current model runner.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
from randfuse.bench.case import Cost, Forward, Inputs, SamplerCase, Shape
from torch import Tensor

from .speculative_accept import ACCEPT_SHAPES, engine_state, vllm

TOP_K, TOP_P = 50, 0.95


def accept(p: Tensor, ids: Tensor) -> Tensor:
    """The rule for one-hot drafts on laws p (B, K+1, V)."""
    k = ids.shape[1]
    px = p[:, :k].gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    stands = (torch.rand_like(px) < px).long().cumprod(-1)
    stop, request = stands.sum(-1), torch.arange(len(ids), device=ids.device)
    left = p[request, stop]
    banned = ids.gather(1, stop.clamp(max=k - 1).unsqueeze(-1))
    left = left.scatter(-1, banned, 0.0).where((stop < k).unsqueeze(-1), left)
    tokens = torch.cat([ids.where(stands.bool(), -1), torch.full_like(ids[:, :1], -1)], -1)
    return tokens.scatter(1, stop.unsqueeze(-1), torch.multinomial(left, 1))


def eager(inputs: Inputs) -> Tensor:
    return accept(inputs["x"].float().softmax(-1), inputs["ids"])


def eager_top_k(inputs: Inputs) -> Tensor:
    x = inputs["x"].float()
    least = x.topk(TOP_K, -1).values[..., -1:]
    return accept(x.masked_fill(x < least, -torch.inf).softmax(-1), inputs["ids"])


def eager_top_p(inputs: Inputs) -> Tensor:
    p, order = inputs["x"].float().softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= TOP_P, 0.0)
    p = torch.zeros_like(p).scatter(-1, order, p)
    return accept(p / p.sum(-1, keepdim=True), inputs["ids"])


class SpeculativeAcceptOneHot(SamplerCase):
    op = "speculative_accept_one_hot"
    letters = "requests,drafts,vocab"
    shapes: ClassVar = ACCEPT_SHAPES

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        b, k, vocab = shape
        x = torch.randn(b, k + 1, vocab, device=device) * 3
        ids = torch.randint(0, vocab, (b, k), device=device)
        likely = x[:, :k].logsumexp(-1, keepdim=True) + 7  # odds of 1000 to 1
        x[:, :k] = x[:, :k].scatter(-1, ids.unsqueeze(-1), likely)
        return {"x": x.to(dtype), "ids": ids, **engine_state(ids)}

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        b, k, vocab = shape
        return Cost(read=b * (k + 1) * vocab * itemsize, written=b * (k + 1) * 12, flops=0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.speculative_accept(inputs["x"], inputs["ids"], key=key).tokens

    def baselines(self) -> dict[str, Forward]:
        accept = randfuse.speculative_accept
        return {
            "eager": eager,
            "eager_top_k": eager_top_k,
            "eager_top_p": eager_top_p,
            "match": lambda i: accept(i["x"], i["ids"], mode="match").tokens,
            "typical": lambda i: accept(i["x"], i["ids"], mode="typical").tokens,
            "top_k": lambda i: accept(i["x"], i["ids"], top_k=TOP_K).tokens,
            "top_p": lambda i: accept(i["x"], i["ids"], top_p=TOP_P).tokens,
            "vllm": vllm,
        }

    def floor(self, inputs: Inputs) -> Tensor:
        """One softmax over the same rows."""
        return inputs["x"].softmax(-1)

    def tokens(self, inputs: Inputs, key: Tensor) -> Tensor:
        with randfuse.use_backend("reference"):
            return self.randfuse(inputs, key)


CASE = SpeculativeAcceptOneHot()
