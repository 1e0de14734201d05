"""`multi_sample_linear(reduce="mean")`: one product of x times a Binomial mask, where the loop has M of dropped copies.

Equal in law, so the least cost is that of one product.
"""

from __future__ import annotations

import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench.case import Inputs, Shape, drop, signed
from randfuse.reference import streams
from randfuse.reference.multi_sample_scale import multi_sample_count
from torch import Tensor

from .multi_sample_linear import Head


class MultiSampleScale(Head):
    op = "multi_sample_scale"

    def ends(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        b, _, c, _ = shape
        return {"grad": signed(b, c, dtype=dtype, device=device)}

    def outputs(self, shape: Shape) -> int:
        return shape[0] * shape[2]

    def products(self, shape: Shape) -> int:
        return 1

    def finish(self, y: list[Tensor], inputs: Inputs) -> Tensor:
        return torch.stack(y).mean(0)

    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        return randfuse.multi_sample_linear(x, weight, bias, self.p, self.samples, reduce="mean", key=key)

    def floor(self, inputs: Inputs) -> Tensor:
        return F.linear(inputs["x"], inputs["weight"], inputs["bias"])

    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        return F.linear(drop(inputs["x"], factor), inputs["weight"], inputs["bias"])

    def scale(self, exactly: bool) -> float:
        thresholds = streams.count_thresholds(streams.threshold(self.p), self.samples)
        return float(streams.count_scale(thresholds)) if exactly else 1.0

    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        thresholds = streams.count_thresholds(streams.threshold(self.p), self.samples)
        return multi_sample_count(key, list(shape[:2]), thresholds, 0, 0)


CASE = MultiSampleScale()
