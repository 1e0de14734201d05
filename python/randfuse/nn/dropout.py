"""`Dropout`: `nn.Dropout` on the streams of this package."""

from __future__ import annotations

from torch import Tensor

from ..ops.dropout import dropout
from ._tensor_p import HasP


class Dropout(HasP):
    """`nn.Dropout` without a stored mask.

    Equivalent to: ``nn.Dropout(p)``, each training forward drawing a fresh key or taking the one it is given

    `p` may be a 0-d tensor (see `DropoutSchedule`).

    >>> randfuse.nn.Dropout(1.0)(torch.ones(3))
    tensor([0., 0., 0.])
    """

    def __init__(self, p: float | Tensor = 0.5) -> None:
        super().__init__()
        self._set_p(p)

    def forward(self, input: Tensor, key: Tensor | None = None) -> Tensor:
        return dropout(input, self.p, self.training, key=key)
