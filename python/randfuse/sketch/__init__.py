"""Sketching: implicit random operators S (d×m) with E[SᵀS] = I, never stored, on either side, along any dimension.

Which one: `SJLT` by default (one read, a few additions an element); `CountSketch` for sparse data; `SRHT`, `SRDCT` for
orthogonal-type sketches of dense data; `Rademacher` and `Gaussian` for small d or exact theory; `TensorSketch` for
polynomial kernels.
"""

from .dense import Gaussian, Rademacher
from .operator import Operator, sketch_many
from .sparse import SJLT, CountSketch
from .tensor_sketch import TensorSketch
from .trigonometric import SRDCT, SRHT

__all__ = [
    "CountSketch",
    "Gaussian",
    "Operator",
    "Rademacher",
    "SJLT",
    "SRDCT",
    "SRHT",
    "TensorSketch",
    "sketch_many",
]
