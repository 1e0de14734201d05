"""What layers with a probability share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks


class HasP(nn.Module):
    """A probability `p`, a float or a 0-d tensor that follows the module to its device, in place."""

    p: float | Tensor

    def _set_p(self, p: float | Tensor) -> None:
        own = p.device if isinstance(p, Tensor) else torch.device("cpu")
        _checks.probability(type(self).__name__, p, next((t.device for t in self.parameters()), own))
        self.p = p

    @property
    def _draws(self) -> bool:
        """Whether the next forward drops anything: not in eval mode, and not with a p that is the number 0."""
        return self.training and (isinstance(self.p, Tensor) or self.p != 0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HasP:
        super()._apply(fn, recurse)
        if isinstance(self.p, Tensor):
            device = fn(self.p.new_empty(0)).device
            if device.type != "meta":
                self.p.data = self.p.data.to(device)  # in place: a schedule and other layers share it
        return self

    def extra_repr(self) -> str:
        p = "tensor" if isinstance(self.p, Tensor) and self.p.device.type == "meta" else f"{float(self.p):g}"
        return ", ".join(part for part in (super().extra_repr(), f"p={p}") if part)


class TensorP(HasP, nn.Linear):
    """`nn.Linear` with a probability."""
