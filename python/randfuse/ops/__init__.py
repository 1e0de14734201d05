"""Public functions, one op a file: docstring, validation, key handling, derivative and batching rule."""

from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear
from .linear_dropout import linear_dropout
from .lora_linear import lora_ensemble, lora_linear

__all__ = ["dropout", "dropout_linear", "dropout_mask", "linear_dropout", "lora_ensemble", "lora_linear"]
