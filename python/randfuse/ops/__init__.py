"""Public functions, one op a file: docstring, validation, key handling, derivative and batching rule."""

from .dropconnect_linear import dropconnect, dropconnect_linear
from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear
from .embedding_dropout import embedding_dropout
from .linear_dropout import linear_dropout
from .mixout_linear import mixout, mixout_linear

__all__ = [
    "dropconnect",
    "dropconnect_linear",
    "dropout",
    "dropout_linear",
    "dropout_mask",
    "embedding_dropout",
    "linear_dropout",
    "mixout",
    "mixout_linear",
]
