"""Public functions, one op a file: docstring, validation, key handling, derivative and batching rule."""

from .dense_sketch import dense_sketch
from .distinct_rows import distinct_rows
from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear
from .hadamard_transform import hadamard_transform
from .linear_dropout import linear_dropout
from .sparse_sketch import sparse_sketch

__all__ = [
    "dense_sketch",
    "distinct_rows",
    "dropout",
    "dropout_linear",
    "dropout_mask",
    "hadamard_transform",
    "linear_dropout",
    "sparse_sketch",
]
