"""`mixout_linear`: y = x (A + D(W - A))ᵀ + b. Least traffic: the plain product's and a read of the anchor A."""

from __future__ import annotations

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Cost, Forward, Inputs, Shape, drop, positive
from torch import Tensor

from .dropconnect_linear import DropConnectLinear


class MixoutLinear(DropConnectLinear):
    op = "mixout_linear"

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        inputs = super().setup(shape, dtype, device)
        return inputs | {"anchor": positive(*shape[:0:-1], dtype=dtype, device=device, mean=shape[1] ** -0.5)}

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        read, written, flops = super().cost(shape, itemsize, backward)
        return Cost(read + shape[1] * shape[2] * itemsize, written, flops)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        x, weight, bias, anchor = inputs["x"], inputs["weight"], inputs["bias"], inputs["anchor"]
        return randfuse.mixout_linear(x, weight, anchor, bias, self.p, key=key)

    def baselines(self) -> dict[str, Forward]:
        def eager(inputs: Inputs) -> Tensor:
            mixed = inputs["anchor"] + F.dropout(inputs["weight"] - inputs["anchor"], self.p)
            return F.linear(inputs["x"], mixed, inputs["bias"])

        return {"eager": eager}

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        mixed = inputs["anchor"] + drop(inputs["weight"] - inputs["anchor"], factor)
        return F.linear(inputs["x"], mixed, inputs["bias"])


CASE = MixoutLinear()
