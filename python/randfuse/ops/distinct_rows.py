"""Different rows chosen at random: what `randfuse.sketch.SRHT` and `SRDCT` keep of a transform.

No GPU kernel: swaps that depend on each other, drawn once an operator. `benchmarks/sketch.py` measures the
transforms.
"""

from __future__ import annotations

from torch import Tensor

from .._backends import call
from .._registry import rules


def distinct_rows(key: Tensor, substream: int, population: int, count: int) -> Tensor:
    """(K, count) different numbers below `population` < 2**32 for keys (K,), every ordered choice equally likely.

    >>> sorted(distinct_rows(torch.tensor([7]), 0, 5, 5)[0].tolist())
    [0, 1, 2, 3, 4]
    """
    return call("distinct_rows", key, substream, population, count)


def _fake(key: Tensor, substream: int, population: int, count: int) -> Tensor:
    return key.new_empty((key.shape[0], count))


rules("distinct_rows", _fake)
