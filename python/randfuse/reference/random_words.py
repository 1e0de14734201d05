"""Reference of `random_words`: blocks of the stream at coordinates of their own."""

from __future__ import annotations

from torch import Tensor

from .streams import WORD_ROUNDS, philox4x32


def random_words(key: Tensor, number: Tensor, sample: Tensor, domain: int) -> tuple[Tensor, Tensor]:
    """Words r0r1 and r2r3 of block `number` (j is its low half, i its high half); all tensors of one shape."""
    low, high = number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF
    d = number.new_full(number.shape, domain)
    r0, r1, r2, r3 = philox4x32(low, high, sample & 0xFFFFFFFF, d, key, WORD_ROUNDS)
    return r0 | r1 << 32, r2 | r3 << 32
