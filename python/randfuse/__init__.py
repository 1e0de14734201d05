"""Fused random operations for PyTorch: random numbers are consumed where they are drawn and never stored.

Every decision is a pure function of (key, op, coordinates), the same on CPU, CUDA, Triton and in the reference.
"""

from . import _extension, _registry
from ._backends import use_backend
from .keys import draw_key, effective_p, fold_in, key, split
from .ops import (
    categorical_sample,
    categorical_sample_with_stats,
    dropout,
    dropout_linear,
    dropout_mask,
    linear_dropout,
)

__version__ = "0.1.0"
__all__ = [
    "categorical_sample",
    "categorical_sample_with_stats",
    "draw_key",
    "dropout",
    "dropout_linear",
    "dropout_mask",
    "effective_p",
    "fold_in",
    "key",
    "linear_dropout",
    "nn",
    "split",
    "use_backend",
]

if _extension.problem is None:
    _registry.install("randfuse")

from . import nn
