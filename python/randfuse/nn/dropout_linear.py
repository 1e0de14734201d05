"""`DropoutLinear`: `nn.Dropout` followed by `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.dropout_linear import dropout_linear
from ._tensor_p import TensorP


class DropoutLinear(TensorP):
    """`nn.Dropout` and `nn.Linear` in one, with the state of `nn.Linear`.

    Equivalent to: ``nn.Sequential(nn.Dropout(p), nn.Linear(in_features, out_features))``

    In training each forward draws a fresh key from torch's default generator, or takes the one it is given; in eval
    mode it is `nn.Linear`. `p` may be a 0-d tensor (see `DropoutSchedule`).

    >>> layer = randfuse.nn.DropoutLinear(8, 4, p=0.1)
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
        return dropout_linear(input, self.weight, self.bias, self.p, self.training, key=key)
