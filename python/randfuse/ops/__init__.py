"""Public functions, one op a file: docstring, validation, key handling, derivative and batching rule."""

from .categorical_sample import categorical_sample, categorical_sample_with_stats
from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear
from .linear_dropout import linear_dropout

__all__ = [
    "categorical_sample",
    "categorical_sample_with_stats",
    "dropout",
    "dropout_linear",
    "dropout_mask",
    "linear_dropout",
]
