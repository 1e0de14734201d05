"""`DropConnectLinear`: `nn.Linear` with dropped weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.dropconnect_linear import dropconnect_linear
from ._tensor_p import TensorP


class DropConnectLinear(TensorP):
    """`nn.Linear` whose weights are dropped in training, with the state of `nn.Linear`.

    Equivalent to: ``F.linear(x, F.dropout(weight, p), bias)``

    Each forward draws a fresh key from torch's default generator, or takes the one it is given: one mask for the whole
    batch. The bias is not dropped. In eval mode it is `nn.Linear`. `p` may be a 0-d tensor (see `DropoutSchedule`).

    >>> layer = randfuse.nn.DropConnectLinear(8, 4, p=0.5)
    >>> layer(torch.ones(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float | Tensor = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_p(p)

    def forward(self, input: Tensor, key: Tensor | None = None) -> Tensor:
        return dropconnect_linear(input, self.weight, self.bias, self.p, self.training, key=key)
