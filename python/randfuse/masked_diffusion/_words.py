"""The random words of masked-diffusion steps: domains 12 to 15 of docs/streams.md. Every sequence has its own key."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.random_words import random_words
from ..reference.streams import domain_word

UNMASK, REMASK, NOISE, CLOCK = 12, 13, 14, 15
_HIGHEST = -(2**63)


def words(keys: Tensor, op: int, step: Tensor, count: int) -> Tensor:
    """64-bit words (B, count) of positions 0, 1, … at a step; keys (B,), step () or (B,)."""
    number = torch.arange((count + 1) // 2, device=keys.device)
    pair = blocks(keys.unsqueeze(-1), op, step.expand(keys.shape).unsqueeze(-1), number)
    return torch.stack(pair, -1).flatten(-2)[..., :count]


def blocks(keys: Tensor, op: int, step: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """The two 64-bit words of blocks `number`: position 2·number and the one after it."""
    return random_words(keys, number, step, domain_word(op, 64))


def coin(word: Tensor, p: Tensor) -> Tensor:
    """word < p·2^64 as unsigned numbers, exact for p down to 2^-64; p is float64, 1 is always and 0 never."""
    # Signed comparisons order unsigned numbers whose highest bit is flipped; p·2^64 − 2^63 has it flipped already.
    upper = p >= 0.5
    limit = (torch.where(upper, p - 0.5, p) * 2.0**64).clamp(0, 2.0**63 - 1024).ceil().long()
    return ((word ^ _HIGHEST) < torch.where(upper, limit, limit ^ _HIGHEST)) | (p >= 1)


def index_below(word: Tensor, n: Tensor) -> Tensor:
    """floor(word · n / 2^64), n < 2^31: uniform on 0 … n − 1."""
    high, low = (word >> 32) & 0xFFFFFFFF, word & 0xFFFFFFFF
    return (high * n + ((low * n) >> 32)) >> 32


def uniform(word: Tensor) -> Tensor:
    """(word + ½)·2^-64 in float64, at most 1 − 2^-53."""
    high, low = (word >> 32) & 0xFFFFFFFF, word & 0xFFFFFFFF
    return ((high.double() * 2.0**32 + (low + 0.5)) * 2.0**-64).clamp(max=1 - 2.0**-53)


def exponential(word: Tensor) -> Tensor:
    """Exp(1) in float64, fine near 0, where races are won."""
    return -torch.log1p(-uniform(word))


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel in float64; the largest is 45."""
    return -exponential(word).log()
