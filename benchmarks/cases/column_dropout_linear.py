"""`dropout_linear(granularity="column")`, p = 0.9: a tenth of the products' work, forward and backward.

The floor is the dense product: what a layer without dropout costs. The least cost reads the kept columns only; the
gradients of x and W are written whole, zeros included.
"""

from __future__ import annotations

from typing import ClassVar

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Case, Cost, Forward, Inputs, Shape, drop, positive, signed
from randfuse.ops.column_dropout_linear import kept_columns
from randfuse.reference import kept_blocks
from randfuse.reference.block_dropout_linear import keep_mask
from randfuse.reference.kept_blocks import COLUMNS
from torch import Tensor

K = 4096  # of all shapes: with it the scale K/k is known to the harness


class ColumnDropoutLinear(Case):
    op = "column_dropout_linear"
    letters = "M,K,N"
    p = 0.9
    differentiable = ("x", "weight", "bias")
    shapes: ClassVar = {
        "smoke": {"cpu": ((256, K, 512),), "cuda": ((4096, K, 4096),)},
        "default": {"cpu": ((512, K, K),), "cuda": ((16384, K, K), (16384, K, 11008))},
        "full": {"cpu": ((512, K, K), (2048, K, 1024)), "cuda": ((16384, K, K), (16384, K, 11008))},
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
        kept = kept_columns(self.p, k)
        read, operations = (m + n) * kept + n, 2 * m * n * kept
        if backward:
            return Cost((read + m * n) * itemsize, (m * n + (m + n) * k + n) * itemsize, 3 * operations)
        return Cost(read * itemsize, m * n * itemsize, operations)

    def scale(self, exactly: bool) -> float:
        return K / kept_columns(self.p, K) if exactly else super().scale(exactly)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        return randfuse.dropout_linear(
            inputs["x"], inputs["weight"], inputs["bias"], self.p, granularity="column", key=key
        )

    def baselines(self) -> dict[str, Forward]:
        return {"eager": lambda inputs: F.linear(F.dropout(inputs["x"], self.p), inputs["weight"], inputs["bias"])}

    def floor(self, inputs: Inputs) -> Tensor:
        return F.linear(inputs["x"], inputs["weight"], inputs["bias"])

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        """Dense in float64. The yardstick, PyTorch in the op's dtype, is the product of the kept columns: one chain of
        K/10 terms, as the op must add them, errs 3 times as much as the dense product, whose sums zeros split."""
        x, weight = drop(inputs["x"], factor), inputs["weight"]
        if x.dtype != torch.float64:
            used = factor.any(0)
            x, weight = x[:, used], weight[:, used]
        return F.linear(x, weight, inputs["bias"])

    def dropped_view(self, out: Tensor, grads: Inputs) -> Tensor:
        return grads["x"]

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        kept = kept_blocks(key, 1, K, kept_columns(self.p, K), 0, COLUMNS, 0)
        return keep_mask(kept, 1, K, 1)[0].expand(shape[0], K)


CASE = ColumnDropoutLinear()
