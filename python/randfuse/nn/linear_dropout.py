"""`LinearDropout`: `nn.Linear`, an activation, `nn.Dropout` and a residual."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.linear_dropout import check_activation, linear_dropout
from ._tensor_p import TensorP


class LinearDropout(TensorP):
    """`nn.Linear`, an activation, `nn.Dropout` and a residual in one, with the state of `nn.Linear`.

    Equivalent to: ``residual + nn.Dropout(p)(act(nn.Linear(in_features, out_features)(x)))``

    In training each forward draws a fresh key from torch's default generator, or takes the one it is given.
    `activation` is None, "relu", "gelu" or "silu"; `p` may be a 0-d tensor (see `DropoutSchedule`).

    >>> layer = randfuse.nn.LinearDropout(8, 4, p=0.1, activation="relu")
    >>> layer(torch.ones(2, 8), residual=torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float | Tensor = 0.5,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_activation("LinearDropout", activation)
        self._set_p(p)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        return linear_dropout(
            input, self.weight, self.bias, self.p, self.training, activation=self.activation, residual=residual, key=key
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
