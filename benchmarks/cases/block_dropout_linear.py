"""`dropout_linear(granularity="block")`, p = 0.5: half of the products' work, forward and backward.

The floor is the dense product: what a layer without dropout costs. The least cost counts the kept half of x and half of
the operations; W is read whole, as some row block keeps each of its columns.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Case, Cost, Forward, Inputs, Shape, drop, positive, signed
from randfuse.ops.kept_blocks import choice
from randfuse.reference import kept_blocks
from randfuse.reference.block_dropout_linear import ROWS, keep_mask
from randfuse.reference.kept_blocks import BLOCKS
from torch import Tensor

SIZE = 128


class BlockDropoutLinear(Case):
    op = "block_dropout_linear"
    letters = "M,K,N"
    p = 0.5  # of an even number of blocks: the scale is 2 exactly, as the harness takes it to be
    differentiable = ("x", "weight", "bias")
    shapes: ClassVar = {
        "smoke": {"cpu": ((512, 1024, 1024),), "cuda": ((4096, 4096, 4096),)},
        "default": {"cpu": ((512, 4096, 4096),), "cuda": ((8192, 8192, 8192), (16384, 4096, 11008))},
        "full": {
            "cpu": ((512, 4096, 4096), (2048, 4096, 1024), (511, 4096, 1023)),
            "cuda": ((8192, 8192, 8192), (16384, 4096, 4096), (16384, 4096, 11008), (16384, 11008, 4096)),
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
        m, k, n = shape
        kept, operations = m * k // 2, m * n * k  # 2 M N K flops, of which a half
        if backward:
            written = m * n + m * k + n * k + n
            return Cost((kept + n * k + n + m * n) * itemsize, written * itemsize, 3 * operations)
        return Cost((kept + n * k + n) * itemsize, m * n * itemsize, operations)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        how = {"granularity": "block", "block_size": SIZE, "key": key}
        return randfuse.dropout_linear(inputs["x"], inputs["weight"], inputs["bias"], self.p, **how)

    def baselines(self) -> dict[str, Forward]:
        return {"eager": lambda inputs: F.linear(F.dropout(inputs["x"], self.p), inputs["weight"], inputs["bias"])}

    def floor(self, inputs: Inputs) -> Tensor:
        return F.linear(inputs["x"], inputs["weight"], inputs["bias"])

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        return F.linear(drop(inputs["x"], factor), inputs["weight"], inputs["bias"])

    def dropped_view(self, out: Tensor, grads: Inputs) -> Tensor:
        return grads["x"]

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        m, k, _ = shape
        blocks = -(-k // SIZE)
        kept, coin, _ = choice(self.p, blocks)
        return keep_mask(kept_blocks(key, -(-m // ROWS), blocks, kept, coin, BLOCKS, 0), m, k, SIZE)[0]


CASE = BlockDropoutLinear()
