"""`DropoutLinear`: `nn.Dropout` followed by `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.dropout_linear import check_granularity, dropout_linear
from ._tensor_p import TensorP


class DropoutLinear(TensorP):
    """`nn.Dropout` and `nn.Linear` in one, with the state of `nn.Linear`.

    Equivalent to: ``nn.Sequential(nn.Dropout(p), nn.Linear(in_features, out_features))``

    In training each forward draws a fresh key from torch's default generator, or takes the one it is given; in eval
    mode it is `nn.Linear`. `p` may be a 0-d tensor (see `DropoutSchedule`). `granularity` "column" or "block" (with its
    `block_size`) drops whole columns or blocks and skips their work; these need a float p.

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
        granularity: str = "element",
        block_size: int = 128,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_p(p)
        check_granularity("DropoutLinear", granularity, p, block_size)
        self.granularity, self.block_size = granularity, block_size

    def forward(self, input: Tensor, key: Tensor | None = None) -> Tensor:
        return dropout_linear(
            input,
            self.weight,
            self.bias,
            self.p,
            self.training,
            granularity=self.granularity,
            block_size=self.block_size,
            key=key,
        )

    def extra_repr(self) -> str:
        size = f", block_size={self.block_size}" if self.granularity == "block" else ""
        how = "" if self.granularity == "element" else f", granularity={self.granularity!r}{size}"
        return super().extra_repr() + how
