"""Reference of `distinct_rows`: the first steps of Fisher and Yates's shuffle."""

from __future__ import annotations

import torch
from torch import Tensor

from . import streams


def distinct_rows(key: Tensor, substream: int, population: int, count: int) -> Tensor:
    """(K, count) different numbers below `population`, every ordered choice equally likely."""
    s = torch.tensor([substream], device=key.device)
    words = streams.long_lanes(key[:, None], s, 0, count, op=streams.SKETCH_PERMUTATION, width=64)
    rows = []
    for line in words.tolist():
        moved: dict[int, int] = {}  # place -> number, where they differ
        for t, word in enumerate(line):
            place = t + (word % 2**64 * (population - t) >> 64)
            rows.append(moved.get(place, place))
            moved[place] = moved.get(t, t)
    return torch.tensor(rows, dtype=torch.int64, device=key.device).reshape(len(key), count)
