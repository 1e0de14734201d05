"""`dropconnect_linear`: y = x D(W)ᵀ + b. The least traffic is the plain product's; a pass over W comes on top.

The product, which eager needs as well, bounds what can be won: with M rows it takes M times the work of the pass.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import (
    Case,
    Cost,
    Forward,
    Inputs,
    Shape,
    drop,
    linear_cost,
    positive,
    reference_mask,
)
from randfuse.reference import streams
from torch import Tensor

# From fine-tuning on little data (M = 64) to a batch that the product dominates.
WEIGHT_SHAPES = {
    "smoke": {"cpu": ((64, 1024, 1024),), "cuda": ((2048, 4096, 4096),)},
    "default": {
        "cpu": ((64, 1024, 1024), (64, 4096, 4096), (512, 4096, 4096)),
        "cuda": ((512, 4096, 4096), (16384, 4096, 4096)),
    },
    "full": {
        "cpu": (*((m, k, k) for k in (1024, 4096) for m in (8, 64, 128, 512)), (63, 1023, 1025)),
        "cuda": tuple((m, 4096, n) for m in (128, 2048, 16384) for n in (4096, 11008)),
    },
}


class DropConnectLinear(Case):
    op = "dropconnect_linear"
    letters = "M,K,N"
    differentiable = ("x", "weight", "bias")
    shapes: ClassVar = WEIGHT_SHAPES

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        m, k, n = shape
        return {
            "x": positive(m, k, dtype=dtype, device=device, mean=m**-0.5),  # gᵀx cannot cancel to 0
            "weight": positive(n, k, dtype=dtype, device=device, mean=k**-0.5),
            "bias": positive(n, dtype=dtype, device=device),
            "grad": positive(m, n, dtype=dtype, device=device),
        }

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        return linear_cost(shape, itemsize, backward)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.dropconnect_linear(inputs["x"], inputs["weight"], inputs["bias"], self.p, key=key)

    def baselines(self) -> dict[str, Forward]:
        return {
            "eager": lambda inputs: F.linear(inputs["x"], F.dropout(inputs["weight"], self.p), inputs["bias"]),
        }

    def floor(self, inputs: Inputs) -> Tensor:
        return F.linear(inputs["x"], inputs["weight"], inputs["bias"])

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        return F.linear(inputs["x"], drop(inputs["weight"], factor), inputs["bias"])

    def dropped_view(self, out: Tensor, grads: Inputs) -> Tensor:
        return grads["weight"]  # D(gᵀ x), a sum of positive terms where kept

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        return reference_mask((shape[2], shape[1]), self.p, key, streams.WEIGHT_MASK)


CASE = DropConnectLinear()
