"""`dropout`: elementwise, bound by memory. Each element is read once and written once per pass."""

from __future__ import annotations

from typing import Any, ClassVar

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Case, Cost, Forward, Inputs, Shape, drop, positive, reference_mask, signed
from randfuse.reference import streams
from torch import Tensor


class _Copy(torch.autograd.Function):
    """The floor of an elementwise op: a copy forward and a copy backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


class Dropout(Case):
    op = "dropout"
    letters = "rows,cols"
    differentiable = ("x",)
    shapes: ClassVar = {
        "smoke": {"cpu": ((512, 4096),), "cuda": ((512, 4096),)},
        "default": {"cpu": ((512, 4096),), "cuda": ((512, 4096), (16384, 4096))},
        "full": {
            "cpu": ((512, 4096), (512, 4097), (4096, 4096)),
            "cuda": ((512, 4096), (16384, 4096), (16384, 4097), (16384, 11008)),
        },
    }

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        return {
            "x": signed(*shape, dtype=dtype, device=device),
            "grad": positive(*shape, dtype=dtype, device=device),
        }

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        moved = shape[0] * shape[1] * itemsize * (2 if backward else 1)
        return Cost(read=moved, written=moved, flops=0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.dropout(inputs["x"], self.p, key=key)

    def baselines(self) -> dict[str, Forward]:
        return {
            "eager": lambda inputs: F.dropout(inputs["x"], self.p),
            "native": lambda inputs: torch.native_dropout(inputs["x"], self.p, True)[0],
        }

    def floor(self, inputs: Inputs) -> Tensor:
        return _Copy.apply(inputs["x"])

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        return drop(inputs["x"], factor)

    def dropped_view(self, out: Tensor, grads: Inputs) -> Tensor:
        return grads["x"]

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        return reference_mask(shape, self.p, key, streams.DROPOUT)


CASE = Dropout()
