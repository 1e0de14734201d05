"""`MultiSampleDropoutHead`: the last layer of a network, under several dropout masks at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.multi_sample_cross_entropy import multi_sample_cross_entropy
from ..ops.multi_sample_linear import multi_sample_linear, samples
from ..ops.multi_sample_scale import MOST_SAMPLES
from ._tensor_p import TensorP


class MultiSampleDropoutHead(TensorP):
    """`nn.Dropout` and `nn.Linear` for several dropout masks at once, with the state of `nn.Linear`.

    Equivalent to: ``nn.Sequential(nn.Dropout(p), nn.Linear(in_features, out_features))``, called `num_samples` times

    `reduce` says what training returns:

    * "loss": given a target, the mean cross entropy of the samples. This is the paper's head: less noise in the
      gradient, so fewer steps to a given loss where mask noise dominates. Without a target, as "none".
    * "mean": the mean of the samples (…, C), in law. Cheap, but only a weaker dropout (see `multi_sample_linear`).
    * "none": the samples (M, …, C), for a loss of one's own.

    In eval mode it is `nn.Linear`, whatever `reduce`; with a target, the cross entropy of that. `options` go to
    `multi_sample_cross_entropy` (ignore_index, label_smoothing, ce_weight, reduction). In training each forward draws
    a fresh key, or takes the one it is given. `p` may be a 0-d tensor (see `DropoutSchedule`).

    >>> head = randfuse.nn.MultiSampleDropoutHead(8, 3, p=0.5, num_samples=4)
    >>> head(torch.ones(2, 8), torch.tensor([0, 2])).shape, head.eval()(torch.ones(2, 8)).shape
    (torch.Size([]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float | Tensor = 0.5,
        num_samples: int = 8,
        reduce: str = "loss",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if reduce not in ("loss", "mean", "none"):
            raise ValueError(f"MultiSampleDropoutHead: reduce must be 'loss', 'mean' or 'none', got {reduce!r}")
        samples("MultiSampleDropoutHead", num_samples, most=MOST_SAMPLES if reduce == "mean" else 2**32 - 1)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_p(p)
        self.num_samples, self.reduce = num_samples, reduce

    def forward(self, input: Tensor, target: Tensor | None = None, key: Tensor | None = None, **options: Any) -> Tensor:
        if target is not None and self.reduce != "loss":
            raise ValueError(f"MultiSampleDropoutHead: target must be None for reduce={self.reduce!r}, got a Tensor")
        if target is None and options:
            raise TypeError(f"MultiSampleDropoutHead: target must be given with options, got {sorted(options)} alone")
        if target is not None:
            p, num_samples = (self.p, self.num_samples) if self.training else (0.0, 1)
            head = input, self.weight, target, self.bias
            return multi_sample_cross_entropy(*head, p, num_samples, key=key, **options)
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        reduce = "mean" if self.reduce == "mean" else "none"
        return multi_sample_linear(input, self.weight, self.bias, self.p, self.num_samples, reduce=reduce, key=key)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_samples={self.num_samples}, reduce={self.reduce!r}"
