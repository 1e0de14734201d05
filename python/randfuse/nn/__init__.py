"""Layers whose state_dict is that of the layer they replace."""

from .dropconnect_linear import DropConnectLinear
from .dropout import Dropout
from .dropout_linear import DropoutLinear
from .embedding_dropout import EmbeddingDropout
from .linear_dropout import LinearDropout
from .locked_dropout import LockedDropout
from .lora_linear import LoRALinear
from .mixout_linear import MixoutLinear
from .multi_sample_dropout_head import MultiSampleDropoutHead
from .patch import patch
from .schedule import DropoutSchedule
from .sketched_linear import SketchedLinear
from .weight_drop import WeightDrop

__all__ = [
    "DropConnectLinear",
    "Dropout",
    "DropoutLinear",
    "DropoutSchedule",
    "EmbeddingDropout",
    "LinearDropout",
    "LoRALinear",
    "LockedDropout",
    "MixoutLinear",
    "MultiSampleDropoutHead",
    "SketchedLinear",
    "WeightDrop",
    "patch",
]
