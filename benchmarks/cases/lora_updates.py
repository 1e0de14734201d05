"""`lora_updates`: the adapter part of LoRA layers alone, u_i = scaling D_i(x) A_iᵀ B_iᵀ for P adapters of one x.

The least traffic reads x once and writes P updates; backward reads their gradients and x, and writes the gradient of x.
No result shows the masks: dx is a sum over them, and the updates are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Case, Cost, Forward, Inputs, Shape, drop, positive, reference_mask, signed
from randfuse.reference import streams
from torch import Tensor

SCALING = 2.0


class LoRAUpdates(Case):
    op = "lora_updates"
    letters = "M,K,N,r,P"
    differentiable = ("x", "lora_a", "lora_b")
    shapes: ClassVar = {
        "smoke": {"cpu": ((512, 1024, 1024, 16, 1),), "cuda": ((2048, 4096, 4096, 16, 3),)},
        "default": {
            "cpu": ((2048, 4096, 4096, 16, 1), (2048, 4096, 4096, 16, 3)),
            "cuda": ((8192, 4096, 4096, 16, 1), (8192, 4096, 4096, 16, 3)),
        },
        "full": {
            "cpu": ((2048, 4096, 4096, 16, 1), (2048, 4096, 4096, 16, 3), (2047, 4097, 255, 64, 2)),
            "cuda": ((8192, 4096, 4096, 16, 1), (8192, 4096, 4096, 16, 3), (16384, 8192, 8192, 64, 3)),
        },
    }

    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        m, k, n, r, adapters = shape
        return {
            "x": signed(m, k, dtype=dtype, device=device),
            "lora_a": positive(adapters, r, k, dtype=dtype, device=device, mean=k**-0.5),
            "lora_b": positive(adapters, n, r, dtype=dtype, device=device, mean=r**-0.5),
            "grad": positive(adapters, m, n, dtype=dtype, device=device),
        }

    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        m, k, n, r, adapters = shape
        factors, out, flops = adapters * r * (k + n), adapters * m * n, 2 * adapters * m * r * (k + n)
        if backward:
            return Cost((m * k + factors + out) * itemsize, (out + m * k + factors) * itemsize, 3 * flops)
        return Cost((m * k + factors) * itemsize, out * itemsize, flops)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        a, b = inputs["lora_a"].unbind(), inputs["lora_b"].unbind()
        return _together(randfuse.lora_updates(inputs["x"], a, b, SCALING, self.p, key=key))

    def baselines(self) -> dict[str, Forward]:
        return {"eager": lambda i: self._plain(i, [F.dropout(i["x"], self.p) for _ in i["lora_a"]])}

    def floor(self, inputs: Inputs) -> Tensor:
        return self._plain(inputs, [inputs["x"]] * len(inputs["lora_a"]))

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        factors = factor.expand(len(inputs["lora_a"]), *inputs["x"].shape)
        return self._plain(inputs, [drop(inputs["x"], f) for f in factors])

    def _plain(self, inputs: Inputs, dropped: list[Tensor]) -> Tensor:
        parts = zip(dropped, inputs["lora_a"], inputs["lora_b"], strict=True)
        return _together([F.linear(F.linear(x, a), b) * SCALING for x, a, b in parts])

    def dropped_view(self, out: Tensor, grads: Inputs) -> None:
        return None

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        return torch.stack(
            [reference_mask(shape[:2], self.p, key, streams.DROPOUT, sample) for sample in range(shape[4])]
        )


def _together(updates: Sequence[Tensor]) -> Tensor:
    """(P, M, N); a single one is not copied."""
    return torch.stack(tuple(updates)) if len(updates) > 1 else updates[0].unsqueeze(0)


CASE = LoRAUpdates()
