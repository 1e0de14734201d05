"""`linear_dropout`: y = D(gelu(x Wᵀ + b)), the first half of a feed-forward block.

The least traffic is that of the plain product: activation and mask belong to its epilogue.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Case, Cost, Forward, Inputs, Shape, drop, linear_cost, positive, reference_mask
from randfuse.reference import streams
from torch import Tensor


class LinearDropout(Case):
    op = "linear_dropout"
    letters = "M,K,N"
    differentiable = ("x", "weight", "bias")
    shapes: ClassVar = {
        "smoke": {"cpu": ((256, 256, 1024),), "cuda": ((2048, 1024, 4096),)},
        "default": {"cpu": ((512, 1024, 4096),), "cuda": tuple((16384, 4096, n) for n in (1024, 4096, 11008))},
        "full": {
            "cpu": ((512, 1024, 4096), (511, 1023, 4097)),
            "cuda": tuple((16384, 4096, n) for n in (128, 1024, 4096, 11008)),
        },
    }

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        m, k, n = shape  # pre-activations come out near 1, where gelu bends
        return {
            "x": positive(m, k, dtype=dtype, device=device),
            "weight": positive(n, k, dtype=dtype, device=device, mean=1 / k),
            "bias": positive(n, dtype=dtype, device=device, mean=0.1),
            "grad": positive(m, n, dtype=dtype, device=device),
        }

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        return linear_cost(shape, itemsize, backward)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        return randfuse.linear_dropout(x, weight, bias, self.p, activation="gelu", key=key)

    def baselines(self) -> dict[str, Forward]:
        return {"eager": lambda inputs: F.dropout(F.gelu(self._linear(inputs)), self.p)}

    def floor(self, inputs: Inputs) -> Tensor:
        return F.gelu(self._linear(inputs))

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        return drop(F.gelu(self._linear(inputs)), factor)

    def dropped_view(self, out: Tensor, grads: Inputs) -> Tensor:
        return out

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        return reference_mask((shape[0], shape[2]), self.p, key, streams.OUTPUT_DROPOUT)

    @staticmethod
    def _linear(inputs: Inputs) -> Tensor:
        return F.linear(inputs["x"], inputs["weight"], inputs["bias"])


CASE = LinearDropout()
