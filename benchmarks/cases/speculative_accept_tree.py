"""`speculative_accept_tree`: binary trees of drafts whose first children are what the target draws, nearly always.

So the path goes down to a leaf, and the least traffic is one read of its rows. "eager" draws at all nodes (a softmax,
one `multinomial`), as target-only verification of trees does, then follows the draws.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
from randfuse.bench.case import Cost, Forward, Inputs, SamplerCase, Shape
from torch import Tensor


def depth_of(drafts: int) -> int:
    """Of the leftmost leaf of a binary tree with a root above its drafts."""
    return (drafts + 1).bit_length() - 1


def eager(inputs: Inputs) -> Tensor:
    x, ids, parents = inputs["x"], inputs["ids"], inputs["parents"]
    b, nodes, vocab = x.shape
    drawn = torch.multinomial(x.float().softmax(-1).view(-1, vocab), 1).view(b, nodes)
    node, alive = torch.zeros_like(ids[:, :1]), torch.ones_like(ids[:, :1], dtype=torch.bool)
    out = torch.full((b, nodes), -1, dtype=torch.int64, device=x.device)
    for depth in range(depth_of(nodes - 1) + 1):
        token = drawn.gather(1, node)
        out[:, depth : depth + 1] = token.where(alive, -1)
        matches = (parents == node) & (ids == token)
        alive = alive & matches.any(-1, keepdim=True)
        node = matches.int().argmax(-1, keepdim=True) + 1
    return out


class SpeculativeAcceptTree(SamplerCase):
    op = "speculative_accept_tree"
    letters = "requests,drafts,vocab"
    shapes: ClassVar = {
        "smoke": {"cpu": ((2, 14, 50257),), "cuda": ((16, 14, 50257),)},
        "default": {"cpu": ((16, 14, 50257),), "cuda": ((1, 62, 151936), (64, 14, 151936))},
        "full": {
            "cpu": ((1, 62, 151936), (16, 14, 50257)),
            "cuda": ((1, 62, 151936), (8, 30, 151936), (64, 14, 151936)),
        },
    }

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        b, n, vocab = shape
        x = torch.randn(b, n + 1, vocab, device=device) * 3
        parents = (torch.arange(n, device=device) // 2).expand(b, n)  # node i has the children 2 i + 1 and 2 i + 2
        ids = torch.randint(0, vocab, (b, n), device=device)
        inner = (n + 1) // 2
        likely = x[:, :inner].logsumexp(-1, keepdim=True) + 7  # odds of 1000 to 1
        x[:, :inner] = x[:, :inner].scatter(-1, ids[:, ::2].unsqueeze(-1), likely)
        return {"x": x.to(dtype), "ids": ids, "parents": parents}

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        b, n, vocab = shape
        return Cost(read=b * (depth_of(n) + 1) * vocab * itemsize, written=b * (n + 1) * 20, flops=0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.speculative_accept_tree(inputs["x"], inputs["ids"], inputs["parents"], key=key).tokens

    def baselines(self) -> dict[str, Forward]:
        return {"eager": eager}

    def floor(self, inputs: Inputs) -> Tensor:
        """One softmax over the rows of a path."""
        x = inputs["x"]
        return x[:, : depth_of(x.shape[1] - 1) + 1].softmax(-1)

    def tokens(self, inputs: Inputs, key: Tensor) -> Tensor:
        with randfuse.use_backend("reference"):
            return self.randfuse(inputs, key)


CASE = SpeculativeAcceptTree()
