"""`multi_sample_mse`: the mean squared error of M masked copies of x under a regression head."""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Inputs, Shape, signed
from torch import Tensor

from .multi_sample_linear import Head


class MultiSampleMse(Head):
    op = "multi_sample_mse"
    shapes: ClassVar = {
        "smoke": {"cpu": ((128, 256, 1, 4),), "cuda": ((1024, 1024, 1, 8),)},
        "default": {"cpu": ((512, 1024, 1, 8),), "cuda": ((64, 1024, 1, 5), (16384, 1024, 1, 8))},
        "full": {"cpu": ((64, 1024, 6, 5), (512, 1024, 1, 8)), "cuda": ((64, 1024, 6, 5), (16384, 1024, 1, 8))},
    }

    def ends(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        b, _, c, _ = shape
        grad = torch.ones((), dtype=dtype, device=device)
        return {"target": signed(b, c, dtype=dtype, device=device), "grad": grad}

    def outputs(self, shape: Shape) -> int:
        return 1

    def finish(self, y: list[Tensor], inputs: Inputs) -> Tensor:
        return torch.stack([F.mse_loss(z, inputs["target"]) for z in y]).mean(0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        x, weight, bias, target = inputs["x"], inputs["weight"], inputs["bias"], inputs["target"]
        return randfuse.multi_sample_mse(x, weight, target, bias, self.p, self.samples, key=key)


CASE = MultiSampleMse()
