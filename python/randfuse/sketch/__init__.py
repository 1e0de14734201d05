"""Sketching: implicit random operators S (d×m) with E[SᵀS] = I, never stored, on either side, along any dimension.

Which one: `SJLT` by default (one read, a few additions an element); `CountSketch` where data are sparse or q⁴ small;
`SRHT` for orthogonal-type sketches of dense data; `Rademacher` and `Gaussian` for small d or exact theory.
"""

from .operator import Operator, sketch_many
from .sparse import SJLT, CountSketch

__all__ = [
    "CountSketch",
    "Operator",
    "SJLT",
    "sketch_many",
]
