"""`multi_sample_cross_entropy`: the mean cross entropy of M masked copies of x under one head.

The least traffic is that of the operands alone, x and W once. The floor is the same loop without dropout, which keeps
M·B·C logits. randfuse keeps M·B floats and computes them again in backward, a third more products; on the CPU and with
many classes it makes the gradients in forward, which keeps them (B·D + C·D + C floats) and needs no product more.
"""

from __future__ import annotations

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Inputs, Shape
from torch import Tensor

from .multi_sample_linear import Head


class MultiSampleCrossEntropy(Head):
    op = "multi_sample_cross_entropy"

    def ends(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        b, _, c, _ = shape
        return {"target": torch.randint(c, (b,), device=device), "grad": torch.ones((), dtype=dtype, device=device)}

    def outputs(self, shape: Shape) -> int:
        return 1

    def finish(self, y: list[Tensor], inputs: Inputs) -> Tensor:
        return torch.stack([F.cross_entropy(z, inputs["target"]) for z in y]).mean(0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        x, weight, bias, target = inputs["x"], inputs["weight"], inputs["bias"], inputs["target"]
        return randfuse.multi_sample_cross_entropy(x, weight, target, bias, self.p, self.samples, key=key)


CASE = MultiSampleCrossEntropy()
