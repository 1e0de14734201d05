"""`dropout_linear`: y = D(x) Wᵀ + b. The least traffic is that of the plain product; the mask costs no bytes.

With few outputs (N up to some hundreds) the product is bound by the read of x, and a dropped copy of x would treble it.
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
    signed,
)
from randfuse.reference import streams
from torch import Tensor


class DropoutLinear(Case):
    op = "dropout_linear"
    letters = "M,K,N"
    differentiable = ("x", "weight", "bias")
    shapes: ClassVar = {
        "smoke": {"cpu": ((256, 1024, 256), (512, 4096, 16)), "cuda": ((2048, 4096, 16), (2048, 4096, 1024))},
        "default": {
            "cpu": ((512, 4096, 1024), (2048, 4096, 16)),
            "cuda": tuple((16384, 4096, n) for n in (16, 64, 128, 1024, 4096, 11008)),
        },
        "full": {
            "cpu": ((512, 4096, 1024), (2048, 4096, 16), (2048, 4096, 1), (2048, 4096, 128), (511, 4097, 1023)),
            "cuda": tuple((16384, 4096, n) for n in (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 11008)),
        },
    }

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        m, k, n = shape
        return {
            "x": signed(m, k, dtype=dtype, device=device),
            "weight": positive(n, k, dtype=dtype, device=device, mean=k**-0.5),
            "bias": signed(n, dtype=dtype, device=device),
            "grad": positive(m, n, dtype=dtype, device=device),
        }

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        return linear_cost(shape, itemsize, backward)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.dropout_linear(inputs["x"], inputs["weight"], inputs["bias"], self.p, key=key)

    def baselines(self) -> dict[str, Forward]:
        return {
            "eager": lambda inputs: F.linear(F.dropout(inputs["x"], self.p), inputs["weight"], inputs["bias"]),
        }

    def floor(self, inputs: Inputs) -> Tensor:
        return F.linear(inputs["x"], inputs["weight"], inputs["bias"])

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        return F.linear(drop(inputs["x"], factor), inputs["weight"], inputs["bias"])

    def dropped_view(self, out: Tensor, grads: Inputs) -> Tensor:
        return grads["x"]  # D(grad W), a sum of positive terms where kept

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        return reference_mask(shape[:2], self.p, key, streams.DROPOUT)


CASE = DropoutLinear()
