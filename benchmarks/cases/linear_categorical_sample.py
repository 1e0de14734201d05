"""`linear_categorical_sample`: a head and a draw from its logits. The least traffic is one read of the weights.

"eager" is the head, float64 copies of its logits, and Gumbel-max; "sampled" is the head with `categorical_sample`,
which stores the logits once.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
from randfuse.bench.case import Cost, Forward, Inputs, SamplerCase, Shape
from torch import Tensor
from torch.nn import functional as F


def head(inputs: Inputs) -> Tensor:
    return F.linear(inputs["x"], inputs["weight"])


def gumbel(inputs: Inputs) -> Tensor:
    x = head(inputs).double()
    return (x.exp() / -torch.rand_like(x).log()).argmax(-1)


class LinearCategoricalSample(SamplerCase):
    op = "linear_categorical_sample"
    letters = "rows,width,vocab"
    shapes: ClassVar = {
        "smoke": {"cpu": ((16, 64, 5000),), "cuda": ((64, 768, 50257),)},
        "default": {"cpu": ((64, 768, 50257),), "cuda": ((64, 4096, 126464), (1024, 768, 50257))},
        "full": {"cpu": ((64, 768, 50257), (512, 768, 50257)), "cuda": ((64, 4096, 126464), (8192, 768, 50257))},
    }

    def logits(self, inputs: Inputs) -> Tensor:
        return head(inputs)

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        n, d, v = shape
        weight = torch.randn(v, d, device=device) * (3 * d**-0.5)
        return {"x": torch.randn(n, d, device=device).to(dtype), "weight": weight.to(dtype)}

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        n, d, v = shape
        return Cost(read=(n * d + v * d) * itemsize, written=n * 8, flops=2 * n * d * v)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.linear_categorical_sample(inputs["x"], inputs["weight"], key=key)

    def baselines(self) -> dict[str, Forward]:
        return {
            "eager": gumbel,
            "multinomial": lambda inputs: torch.multinomial(head(inputs).float().softmax(-1), 1),
            "sampled": lambda inputs: randfuse.categorical_sample(head(inputs)),
        }

    def floor(self, inputs: Inputs) -> Tensor:
        return head(inputs)[..., 0].long()  # the product alone

    def tokens(self, inputs: Inputs, key: Tensor) -> Tensor:
        with randfuse.use_backend("reference"):
            return self.randfuse(inputs, key)


CASE = LinearCategoricalSample()
