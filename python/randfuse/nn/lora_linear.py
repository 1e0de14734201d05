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

    The state is that of `nn.Linear` and, named as in PEFT's adapter files, `lora_A.weight` (r, in) and `lora_B.weight`
    (out, r), which starts at zero: both kinds of checkpoint load with strict=False, and `load_adapter` takes its part
    of a whole PEFT file. The state of a merged layer holds the weight without the adapter, and loading one unmerges. In
    training each forward draws a fresh key from torch's default generator, or takes the one
    it is given. `p` may be a 0-d tensor (see `DropoutSchedule`).

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        r: rank of the adapter, at least 1.
        lora_alpha: the adapter is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        p: lora_dropout.
        drop: "input" (PEFT's lora_dropout) or "factors" (LoRA Dropout), see `lora_linear`.
        adapter_dtype: dtype of the adapter, that of the layer or float32.

    >>> layer = randfuse.nn.LoRALinear(8, 4, r=2, p=0.1)
    >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ['lora_A.weight', 'lora_B.weight']
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
        self.lora_A = nn.Linear(in_features, r, bias=False, **factory)  # nn.Linear's initialisation is LoRA's
        self.lora_B = nn.Linear(r, out_features, bias=False, **factory)
        nn.init.zeros_(self.lora_B.weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> LoRALinear:
        """An adapter around an existing layer, whose weight and bias it shares and freezes."""
        weight, bias = linear.weight, linear.bias
        size = linear.in_features, linear.out_features
        layer = cls(*size, bias=bias is not None, device=weight.device, dtype=weight.dtype, **kwargs)
        for name, parameter in (("weight", weight), ("bias", bias)):
            if parameter is not None:
                setattr(layer, name, parameter.requires_grad_(False))
        return layer.train(linear.training)

    def forward(self, input: Tensor, key: Tensor | None = None) -> Tensor:
        if self.merged:
            return super().forward(input)
        adapter = (self.lora_A.weight, self.lora_B.weight, self.scaling, self.p, self.training)
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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # the adapter is in the state too: who loads both must not apply it twice
            destination[prefix + "weight"] = self.weight.detach() - self._update().detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def _update(self) -> Tensor:
        a, b = self.lora_A.weight, self.lora_B.weight
        wide = torch.promote_types(a.dtype, torch.float32)  # the product is rounded once
        return (self.scaling * (b.to(wide) @ a.to(wide))).to(self.weight.dtype)

    @torch.no_grad()
    def load_adapter(self, state: Mapping[str, Tensor], prefix: str = "") -> LoRALinear:
        """Take lora_A and lora_B from a PEFT state: the keys `{prefix}lora_A[.adapter].weight` and lora_B alike.

        Raises KeyError unless exactly one adapter of that prefix is there, ValueError for another shape.
        """
        if self.merged:
            raise RuntimeError("LoRALinear: load_adapter must be called on an unmerged layer, got a merged one")
        found = {}
        for name in ("lora_A", "lora_B"):
            names = [k for k in state if k.startswith(f"{prefix}{name}.") and k.endswith(".weight")]
            if len(names) != 1:
                raise KeyError(f"LoRALinear: state must have one {prefix}{name}[.adapter].weight, got {names}")
            parameter, found[name] = getattr(self, name).weight, state[names[0]]
            _checks.shape("LoRALinear", names[0], found[name], tuple(parameter.shape), f"of {name}")
        for name, value in found.items():
            getattr(self, name).weight.copy_(value)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, drop={self.drop}"
