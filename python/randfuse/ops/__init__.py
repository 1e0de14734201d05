"""Public functions, one op a file: docstring, validation, key handling, derivative and batching rule."""

from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear
from .linear_dropout import linear_dropout
from .mc_dropout_predict import mc_dropout_predict
from .multi_sample_cross_entropy import multi_sample_cross_entropy
from .multi_sample_linear import multi_sample_linear
from .multi_sample_mse import multi_sample_mse

__all__ = [
    "dropout",
    "dropout_linear",
    "dropout_mask",
    "linear_dropout",
    "mc_dropout_predict",
    "multi_sample_cross_entropy",
    "multi_sample_linear",
    "multi_sample_mse",
]
