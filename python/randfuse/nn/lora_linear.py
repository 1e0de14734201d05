"""`LoRALinear`: a frozen linear layer with a trained low-rank adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.lora_linear import lora_linear
from ._tensor_p import TensorP


class LoRALinear(TensorP):
    """`nn.Linear` with frozen weight and bias, and an adapter of rank r with dropout.

    Equivalent to: ``F.linear(x, weight, bias) + scaling * lora_B(lora_A(nn.Dropout(p)(x)))``

    The state is that of `nn.Linear` and, beside it, `lora_A` (r, in) and `lora_B` (out, r), which starts at zero;
    `load_adapter` takes the weights of a PEFT checkpoint, and a checkpoint of `nn.Linear` loads with strict=False. In
    training each forward draws a fresh key from torch's default generator, or takes the one it is given. `p` may be a
    0-d tensor (see `DropoutSchedule`).

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        r: rank of the adapter, at least 1.
        lora_alpha: the adapter is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        p: lora_dropout.
        drop: "input" (PEFT's lora_dropout) or "factors" (LoRA Dropout), see `lora_linear`.
        adapter_dtype: dtype of the adapter, that of the layer or float32.

    >>> layer = randfuse.nn.LoRALinear(8, 4, r=2, p=0.1)
    >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ['lora_A', 'lora_B']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        p: float | Tensor = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        drop: str = "input",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"LoRALinear: r must be a positive int, got {r}")
        if drop not in ("input", "factors"):
            raise ValueError(f"LoRALinear: drop must be 'input' or 'factors', got {drop!r}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight.requires_grad_(False)
        if bias:
            self.bias.requires_grad_(False)
        self._set_p(p)
        self.r, self.drop, self.merged = r, drop, False
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        factory: dict[str, Any] = {"device": device, "dtype": adapter_dtype or dtype}
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **factory))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, **factory))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> LoRALinear:
        """An adapter around an existing layer, whose weight and bias it shares and freezes."""
        weight, bias = linear.weight, linear.bias
        size = linear.in_features, linear.out_features
        layer = cls(*size, bias=bias is not None, device=weight.device, dtype=weight.dtype, **kwargs)
        layer.weight, layer.bias = weight.requires_grad_(False), None if bias is None else bias.requires_grad_(False)
        return layer.train(linear.training)

    def forward(self, input: Tensor, key: Tensor | None = None) -> Tensor:
        if self.merged:
            return super().forward(input)
        adapter = (self.lora_A, self.lora_B, self.scaling, self.p, self.training)
        return lora_linear(input, self.weight, self.bias, *adapter, drop=self.drop, key=key)

    @torch.no_grad()
    def merge(self) -> LoRALinear:
        """Add the adapter to the weight: the layer then costs what `nn.Linear` costs and drops nothing."""
        if not self.merged:
            self.weight += self._update()
            self.merged = True
        return self

    @torch.no_grad()
    def unmerge(self) -> LoRALinear:
        """Take the adapter out of the weight again, up to rounding."""
        if self.merged:
            self.weight -= self._update()
            self.merged = False
        return self

    def _update(self) -> Tensor:
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)  # as PEFT, which rounds the product once
        return (self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))).to(self.weight.dtype)

    @torch.no_grad()
    def load_adapter(self, state: Mapping[str, Tensor], prefix: str = "") -> LoRALinear:
        """Take lora_A and lora_B from a PEFT state: the keys `{prefix}lora_A[.adapter].weight` and lora_B alike.

        Raises KeyError unless exactly one adapter of that prefix is there, ValueError for another shape.
        """
        if self.merged:
            raise RuntimeError("LoRALinear: load_adapter must be called on an unmerged layer, got a merged one")
        for name in ("lora_A", "lora_B"):
            found = [k for k in state if k.startswith(f"{prefix}{name}.") and k.endswith(".weight")]
            if len(found) != 1:
                raise KeyError(f"LoRALinear: state must have one {prefix}{name}[.adapter].weight, got {found}")
            parameter, value = getattr(self, name), state[found[0]]
            _checks.shape("LoRALinear", found[0], value, tuple(parameter.shape), f"of {name}")
            parameter.copy_(value)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, drop={self.drop}"
