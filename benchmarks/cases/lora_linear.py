"""`lora_linear`: y = x Wᵀ + scaling D(x) Aᵀ Bᵀ with W frozen, as in fine-tuning. The floor is the same without dropout.

Beside the base product the least traffic is one read of x and, in place, nothing of y; backward reads the gradient for
B, x again for A, and adds to dx in place. With N = 4096 the base product takes nearly all of the time; N = 256 shows
the adapter.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Case, Cost, Forward, Inputs, Shape, drop, positive, reference_mask, signed
from randfuse.reference import streams
from torch import Tensor

SCALING = 2.0


class LoRALinear(Case):
    op = "lora_linear"
    letters = "M,K,N,r"
    differentiable = ("x", "lora_a", "lora_b")
    shapes: ClassVar = {
        "smoke": {"cpu": ((512, 4096, 256, 16),), "cuda": ((2048, 4096, 4096, 16),)},
        "default": {"cpu": ((2048, 4096, 256, 16),), "cuda": ((8192, 4096, 4096, 16), (8192, 4096, 11008, 16))},
        "full": {
            "cpu": ((2048, 4096, 256, 16), (2048, 4096, 4096, 16), (2047, 4097, 255, 64)),
            "cuda": ((8192, 4096, 4096, 16), (8192, 4096, 11008, 16), (16384, 8192, 8192, 64)),
        },
    }

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        m, k, n, r = shape
        return {
            "x": signed(m, k, dtype=dtype, device=device),
            "weight": signed(n, k, dtype=dtype, device=device) * k**-0.25,  # y's base is of the adapter's size
            "lora_a": positive(r, k, dtype=dtype, device=device, mean=k**-0.5),
            "lora_b": positive(n, r, dtype=dtype, device=device, mean=r**-0.5),
            "grad": positive(m, n, dtype=dtype, device=device, mean=n**-0.5),
        }

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        m, k, n, r = shape
        operands, out, adapter = m * k + n * k + r * (k + n), m * n, 2 * m * r * (k + n)
        if backward:  # the base's dx, the adapter's three products beside it
            read, written = operands + out, out + m * k + r * (k + n)
            return Cost(read * itemsize, written * itemsize, 4 * m * n * k + 3 * adapter)
        return Cost(operands * itemsize, out * itemsize, 2 * m * n * k + adapter)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        factors = inputs["lora_a"], inputs["lora_b"]
        return randfuse.lora_linear(inputs["x"], inputs["weight"], None, *factors, SCALING, self.p, key=key)

    def baselines(self) -> dict[str, Forward]:
        return {"eager": lambda inputs: self._plain(inputs, F.dropout(inputs["x"], self.p))}

    def floor(self, inputs: Inputs) -> Tensor:
        return self._plain(inputs, inputs["x"])

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        return self._plain(inputs, drop(inputs["x"], factor))

    def _plain(self, inputs: Inputs, dropped: Tensor) -> Tensor:
        update = F.linear(F.linear(dropped, inputs["lora_a"]), inputs["lora_b"])
        return F.linear(inputs["x"], inputs["weight"]) + update * SCALING

    def dropped_view(self, out: Tensor, grads: Inputs) -> None:
        return None  # the base product fills dx; a wrong decision is off by a term of D(ds A), far above rounding

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        return reference_mask(shape[:2], self.p, key, streams.DROPOUT)


CASE = LoRALinear()
