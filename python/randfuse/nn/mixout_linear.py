"""`MixoutLinear`: `nn.Linear` that fine-tunes under mixout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.mixout_linear import mixout_linear
from ._tensor_p import TensorP


class MixoutLinear(TensorP):
    """`nn.Linear` whose weights go back to their pretrained values with probability p, anew in each training forward.

    Equivalent to: ``F.linear(x, anchor_weight + F.dropout(weight - anchor_weight, p), bias)``

    The anchor is a buffer outside the state, which is that of `nn.Linear`: it stands in the pretrained checkpoint
    already. So make the layer from the pretrained one (`from_linear`), or load that and call `set_anchor()`; a
    fine-tuned state loaded afterwards leaves the anchor alone. Training without an anchor raises. The bias is not
    mixed; in eval mode it is `nn.Linear`. `p` may be a 0-d tensor (see `DropoutSchedule`).

    >>> layer = randfuse.nn.MixoutLinear.from_linear(torch.nn.Linear(8, 4), p=0.9)
    >>> layer(torch.ones(2, 8)).shape
    torch.Size([2, 4])
    """

    anchor_weight: Tensor | None

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
        self.register_buffer("anchor_weight", None, persistent=False)
        self._set_p(p)

    @classmethod
    def from_linear(cls, linear: nn.Linear, p: float | Tensor = 0.5) -> MixoutLinear:
        """A layer over the parameters of a pretrained one (the same objects), anchored where they are now."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._set_p(p)
        layer.set_anchor()
        return layer.train(linear.training)

    def set_anchor(self) -> None:
        """Take a copy of the present weight as the anchor."""
        self.anchor_weight = self.weight.detach().clone()

    def forward(self, input: Tensor, key: Tensor | None = None) -> Tensor:
        if not self._draws:
            return nn.Linear.forward(self, input)
        if self.anchor_weight is None:
            raise RuntimeError("MixoutLinear: anchor_weight must be set before training (set_anchor), got None")
        return mixout_linear(input, self.weight, self.anchor_weight, self.bias, self.p, key=key)
