"""`categorical_sample`: one token a row of raw logits. The least traffic is one read of the logits.

"eager" is the float64 Gumbel-max that masked diffusion models run for the sake of exactness (Zheng et al. 2024; the
form of LLaDA). The float32 forms, FlashInfer's among them, are inexact in the tail and stand here for their speed.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
from randfuse.bench.case import Cost, Forward, Inputs, SamplerCase, Shape
from torch import Tensor


def gumbel(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """argmax of exp(l) / -log u, which is that of l + Gumbel."""
    x = inputs["x"].to(dtype)
    return (x.exp() / -torch.rand_like(x).log()).argmax(-1)


def exponential_race(inputs: Inputs) -> Tensor:
    """argmax p / E, as language model servers draw without a synchronisation."""
    p = inputs["x"].float().softmax(-1)
    return (p / torch.empty_like(p).exponential_(1)).argmax(-1)


def flashinfer(inputs: Inputs) -> Tensor:
    from flashinfer import sampling

    return sampling.sampling_from_logits(inputs["x"], seed=inputs["seed"], offset=inputs["offset"])


def flashinfer_probs(inputs: Inputs) -> Tensor:
    from flashinfer import sampling

    p = sampling.softmax(inputs["x"])
    return sampling.sampling_from_probs(p, seed=inputs["seed"], offset=inputs["offset"])


class CategoricalSample(SamplerCase):
    op = "categorical_sample"
    letters = "rows,vocab"
    method = "cdf"
    shapes: ClassVar = {
        "smoke": {"cpu": ((16, 50257),), "cuda": ((64, 50257),)},
        "default": {"cpu": ((64, 50257),), "cuda": ((64, 50257), (1024, 50257), (1024, 126464))},
        "full": {
            "cpu": ((1, 50257), (64, 50257), (64, 151936), (1024, 1024)),
            "cuda": ((8, 126464), (64, 50257), (256, 151936), (1024, 126464), (8192, 50258)),
        },
    }

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        word = torch.ones(1, dtype=torch.int64, device=device)  # FlashInfer's, so that a CUDA graph may hold its call
        return {"x": (torch.randn(*shape, device=device) * 3).to(dtype), "seed": word, "offset": word}

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        return Cost(read=shape[0] * shape[1] * itemsize, written=shape[0] * 8, flops=0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.categorical_sample(inputs["x"], method=self.method, key=key)

    def baselines(self) -> dict[str, Forward]:
        return {
            "eager": lambda inputs: gumbel(inputs, torch.float64),
            "gumbel32": lambda inputs: gumbel(inputs, torch.float32),
            "multinomial": lambda inputs: torch.multinomial(inputs["x"].float().softmax(-1), 1),
            "race32": exponential_race,
            "race": lambda inputs: randfuse.categorical_sample(inputs["x"], method="race"),
            "softmax": lambda inputs: inputs["x"].softmax(-1)[..., 0].long(),  # no draw: the time of a softmax
            "flashinfer": flashinfer,
            "flashinfer_probs": flashinfer_probs,
        }

    def floor(self, inputs: Inputs) -> Tensor:
        return inputs["x"].amax(-1)

    def tokens(self, inputs: Inputs, key: Tensor) -> Tensor:
        with randfuse.use_backend("reference"):
            return self.randfuse(inputs, key)


CASE = CategoricalSample()
