"""PEFT models on the fused path: one line, reversible, checkpoints interchangeable.

    report = randfuse.integrations.peft.enable(model)

PEFT computes ``base(x) + lora_B(lora_A(dropout(x))) * scaling`` and keeps, for each layer, a dropped copy of x (in
float32 where the adapters are) and its mask. `lora_linear` computes the same and keeps neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from .. import _autocast
from .. import nn as randfuse_nn
from ..ops import lora_linear, lora_updates

SMALL = 2**17  # elements of x: below, PEFT's own ops are as fast on the CPU (docs/measured.md)
DROPOUTS = nn.Dropout, nn.Identity, randfuse_nn.Dropout


@dataclass
class Report:
    """What `enable` did: names of the layers it switched, and of those it left to PEFT with the reason."""

    switched: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"randfuse: {len(self.switched)} LoRA layers switched, {len(self.left)} left to PEFT"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.left.items()])


def enable(model: nn.Module) -> Report:
    """Put the LoRA layers of a PEFT model on `lora_linear`, in place.

    Parameters, state_dict, adapter files, `add_adapter`, `set_adapter`, merging and `disable_adapter` stay PEFT's; only
    `forward` of plain LoRA layers on `nn.Linear` changes. Masks differ from those of PEFT (other random numbers, the
    same law), follow `torch.manual_seed` and are redrawn alike under activation checkpointing. Layers with a variant
    (DoRA, …), on quantised or other bases, with another lora_dropout, with hooks on their parts, a replaced forward or
    lora_bias are left to PEFT, as the report says; so are calls with merged or disabled adapters, with `adapter_names`,
    with inputs that PEFT would cast to less than their dtype, with weights of a tensor subclass or a scaling that is no
    number, calls that neither drop nor need a gradient, which have nothing to save, and on the CPU calls with less than
    2**17 elements of x (256 tokens of 512), where PEFT's own ops are as fast.
    Enabling twice changes nothing; after loading more adapters nothing need be done.

    Args:
        model: a module that contains LoRA layers of PEFT.

    Returns:
        A `Report`; `print(enable(model))` shows what was switched and what was not.

    Raises:
        ValueError: the model has no LoRA layer of PEFT.
    """
    report = Report()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        reason = _why_not(module)
        if reason is None:
            module.__class__ = FusedLinear  # a subclass without state of its own: copies, pickles, compiles
            report.switched.append(name)
        else:
            report.left[name] = reason
    if not report.switched and not report.left:
        raise ValueError("enable: model must have LoRA layers of PEFT, got none")
    return report


def disable(model: nn.Module) -> list[str]:
    """Give the layers that `enable` switched back to PEFT; returns their names."""
    names = [name for name, module in model.named_modules() if isinstance(module, FusedLinear)]
    for name in names:
        model.get_submodule(name).__class__ = Linear
    return names


class FusedLinear(Linear):
    """PEFT's `lora.Linear` with another forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = [a for a in self.active_adapters if a in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or not adapters or not _covered(self, adapters, x):
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        first, *others = ((*_adapter(self, name), self.scaling[name]) for name in adapters)
        a, b, p, training, scaling = first
        base_result = result = lora_linear(x, base.weight, base.bias, a, b, scaling, p, training)
        for a, b, p, training, scaling in others:  # each adapter has a mask of its own, and may have a p
            result = result + lora_updates(x, [a], [b], scaling, p, training)[0]
        return result.to(base_result.dtype)


def _adapter(module: Any, name: str) -> tuple[Tensor, Tensor, float, bool]:
    """lora_A, lora_B, p and training of one adapter."""
    dropout = module.lora_dropout[name]
    p, training = (0.0, False) if isinstance(dropout, nn.Identity) else (dropout.p, dropout.training)
    return module.lora_A[name].weight, module.lora_B[name].weight, p, training


def _why_not(module: LoraLayer) -> str | None:
    """Why a LoRA layer cannot be switched, or None."""
    if type(module) not in (Linear, FusedLinear):
        return f"a layer of type {type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
    if "forward" in module.__dict__:
        return "its forward is replaced"
    variants = sorted({type(v).__name__ for v in module.lora_variant.values()})
    if variants:
        return f"uses {', '.join(variants)}"
    if any(module.lora_bias.values()):
        return "has lora_bias"
    if not _plain(module.base_layer, nn.Linear):
        return f"the base layer is not a plain nn.Linear but a {type(module.base_layer).__name__}, or has hooks"
    parts = (*module.lora_A.values(), *module.lora_B.values())
    if not all(_plain(part, nn.Linear) for part in parts):
        return "lora_A or lora_B is not a plain nn.Linear, or has hooks"
    if not all(_plain(part, *DROPOUTS) for part in module.lora_dropout.values()):
        return "lora_dropout is not a plain nn.Dropout, or has hooks"
    return None


def _plain(module: nn.Module, *types: type) -> bool:
    """Exactly of one of the types, and calling it does nothing else: no hooks, no replaced forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) in types and not any(hooks) and "forward" not in module.__dict__


def _covered(module: FusedLinear, adapters: list[str], x: Tensor) -> bool:
    """Whether this call is one of `lora_linear`; what may change after `enable` is looked at again."""
    if x.device.type == "cpu" and x.numel() < SMALL:
        return False
    if _why_not(module) is not None or x.device.type not in ("cpu", "cuda", "meta"):
        return False
    base, parts = module.base_layer, [_adapter(module, name) for name in adapters]
    tensors = [x, base.weight, *(factor for a, b, *_ in parts for factor in (a, b))]
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return False
    if any(type(module.scaling[name]) not in (int, float) for name in adapters):
        return False
    dropping = any(training and (isinstance(p, Tensor) or p != 0) for *_, p, training in parts)
    training_something = any(t.requires_grad for t in (*tensors, *base.parameters()))
    if not dropping and not (torch.is_grad_enabled() and training_something):
        return False
    if _autocast.enabled(x.device.type):
        return True
    factors = {factor.dtype for a, b, *_ in parts for factor in (a, b)}
    allowed = {x.dtype} if x.dtype == torch.float64 or not module.cast_input_dtype_enabled else {x.dtype, torch.float32}
    return x.dtype == base.weight.dtype and len(factors) == 1 and factors <= allowed
