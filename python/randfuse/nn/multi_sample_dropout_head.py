"""`MultiSampleDropoutHead`: the last layer of a network, under several dropout masks at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.multi_sample_cross_entropy import multi_sample_cross_entropy
from ..ops.multi_sample_linear import multi_sample_linear
from ._tensor_p import TensorP


class MultiSampleDropoutHead(TensorP):
    """`nn.Dropout` and `nn.Linear` for several dropout masks at once, with the state of `nn.Linear`.

    Equivalent to: ``nn.Sequential(nn.Dropout(p), nn.Linear(in_features, out_features))``, called `num_samples` times

    `reduce` says what training returns:

    * "loss": given a target, the mean cross entropy of the samples. This is the paper's head: less noise in the
      gradient, so fewer steps to a given loss. Without a target, as "none".
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
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_p(p)
        self.num_samples, self.reduce = num_samples, reduce

    def forward(self, input: Tensor, target: Tensor | None = None, key: Tensor | None = None, **options: Any) -> Tensor:
        if target is not None and self.reduce != "loss":
            raise ValueError(f"MultiSampleDropoutHead: target must be None for reduce={self.reduce!r}, got a Tensor")
        if not self.training:
            logits = F.linear(input, self.weight, self.bias)
            return logits if target is None else _cross_entropy(logits, target, **options)
        head = input, self.weight
        if target is not None:
            return multi_sample_cross_entropy(*head, target, self.bias, self.p, self.num_samples, key=key, **options)
        reduce = "mean" if self.reduce == "mean" else "none"
        return multi_sample_linear(*head, self.bias, self.p, self.num_samples, reduce=reduce, key=key)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_samples={self.num_samples}, reduce={self.reduce!r}"


def _cross_entropy(logits: Tensor, target: Tensor, ce_weight: Tensor | None = None, **options: Any) -> Tensor:
    """F.cross_entropy with the classes last, as everywhere in this package."""
    soft = target.is_floating_point()
    target = target.reshape(-1, logits.shape[-1]) if soft else target.reshape(-1)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target, ce_weight, **options)
    return loss.reshape(logits.shape[:-1]) if loss.dim() else loss
