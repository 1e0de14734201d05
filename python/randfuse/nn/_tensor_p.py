"""What layers with a probability share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import _checks


class TensorP(nn.Linear):
    """`nn.Linear` with a probability `p`, a float or a 0-d tensor that follows the layer to its device, in place."""

    p: float | Tensor

    def _set_p(self, p: float | Tensor) -> None:
        _checks.probability(type(self).__name__, p, self.weight.device)
        self.p = p

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TensorP:
        super()._apply(fn, recurse)
        if isinstance(self.p, Tensor) and self.weight.device.type != "meta":
            self.p.data = self.p.data.to(self.weight.device)  # in place: a schedule and other layers share it
        return self

    def extra_repr(self) -> str:
        p = "tensor" if isinstance(self.p, Tensor) and self.p.device.type == "meta" else f"{float(self.p):g}"
        return f"{super().extra_repr()}, p={p}"
