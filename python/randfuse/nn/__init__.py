"""Layers whose state_dict is that of the layer they replace."""

from .dropout_linear import DropoutLinear
from .linear_dropout import LinearDropout
from .multi_sample_dropout_head import MultiSampleDropoutHead
from .schedule import DropoutSchedule

__all__ = ["DropoutLinear", "DropoutSchedule", "LinearDropout", "MultiSampleDropoutHead"]
