"""`multi_sample_linear`: y_m = D_m(x) Wᵀ + b for M masks. The least traffic reads x once and writes M outputs.

The loop that it replaces drops, copies and reads x M times. No sum of masked products shows the single masks, so
randfuse is compared with the result of the reference's masks.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
import torch.nn.functional as F
from randfuse import reference
from randfuse.bench.case import Case, Cost, Forward, Inputs, Shape, drop, signed
from randfuse.reference import streams
from torch import Tensor


class Head(Case):
    """A linear head (C, D) on x (B, D) under M masks; cases differ in what they do with its outputs."""

    letters = "B,D,C,M"
    p = 0.5
    differentiable = ("x", "weight", "bias")
    shapes: ClassVar = {
        "smoke": {"cpu": ((128, 256, 16, 4),), "cuda": ((1024, 1024, 16, 8),)},
        "default": {
            "cpu": ((512, 1024, 16, 8), (512, 1024, 1000, 8)),
            "cuda": ((64, 1024, 6, 5), (16384, 1024, 16, 8), (4096, 1024, 1000, 8)),
        },
        "full": {
            "cpu": ((64, 1024, 6, 5), (512, 1024, 16, 8), (4096, 1024, 16, 8), (512, 1024, 1000, 8)),
            "cuda": ((64, 1024, 6, 5), (64, 4096, 10, 8), (16384, 1024, 16, 8), (16384, 1024, 16, 64)),
        },
    }  # fmt: skip

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        b, d, c, m = shape
        self.samples = m
        return {
            "x": signed(b, d, dtype=dtype, device=device),
            "weight": (torch.randn(c, d, device=device) * d**-0.5).to(dtype),
            "bias": signed(c, dtype=dtype, device=device),
            **self.ends(shape, dtype, device),
        }

    def ends(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        """What comes after the head: targets, and the gradient of the output."""
        b, _, c, m = shape
        return {"grad": signed(m, b, c, dtype=dtype, device=device)}

    def outputs(self, shape: Shape) -> int:
        b, _, c, m = shape
        return m * b * c

    def products(self, shape: Shape) -> int:
        """Samples that need a product of their own."""
        return shape[3]

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        b, d, c, _ = shape
        operands, out = b * d + c * d + c, self.outputs(shape)
        flops = self.products(shape) * 2 * b * d * c
        if backward:
            return Cost((operands + out) * itemsize, (out + operands) * itemsize, 3 * flops)
        return Cost(operands * itemsize, out * itemsize, flops)

    def finish(self, y: list[Tensor], inputs: Inputs) -> Tensor:
        """The output of the case from those of the samples."""
        return torch.stack(y)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        return randfuse.multi_sample_linear(x, weight, bias, self.p, self.samples, key=key)

    def baselines(self) -> dict[str, Forward]:
        return {"eager": lambda i: self._loop(i, [F.dropout(i["x"], self.p) for _ in range(self.samples)])}

    def floor(self, inputs: Inputs) -> Tensor:
        return self._loop(inputs, [inputs["x"]] * self.samples)

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        factors = factor.expand(self.samples, *inputs["x"].shape)
        return self._loop(inputs, [drop(inputs["x"], f) for f in factors])

    def _loop(self, inputs: Inputs, xs: list[Tensor]) -> Tensor:
        return self.finish([F.linear(x, inputs["weight"], inputs["bias"]) for x in xs], inputs)

    def dropped_view(self, out: Tensor, grads: Inputs) -> None:
        return None

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        rows, cols, _, samples = shape
        masks = [
            reference.dropout_mask(key, [rows, cols], self.p, None, streams.DROPOUT, m, 0, 0) for m in range(samples)
        ]
        return torch.stack(masks)


class MultiSampleLinear(Head):
    op = "multi_sample_linear"


CASE = MultiSampleLinear()
