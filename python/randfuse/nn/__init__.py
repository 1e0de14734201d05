"""Layers whose state_dict is that of the layer they replace."""

from .dropout_linear import DropoutLinear
from .linear_dropout import LinearDropout
from .lora_linear import LoRALinear
from .schedule import DropoutSchedule

__all__ = ["DropoutLinear", "DropoutSchedule", "LinearDropout", "LoRALinear"]
