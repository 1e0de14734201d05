"""Random streams, version 1, in plain PyTorch: the specification of `docs/streams.md` as code.

32-bit words live in int64 tensors, which hold a 32x32->64 product modulo 2**64 exactly.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

VERSION = 1
DROPOUT, OUTPUT_DROPOUT = 1, 2  # op ids; the full table is in docs/streams.md
WEIGHT_MASK = 3
EMBEDDING_ROW = 22
STRUCTURED = 4
MULTI_SAMPLE_COUNT = 6
SKETCH_SIGN, SKETCH_INDEX, SKETCH_NORMAL, SKETCH_PERMUTATION = 16, 17, 18, 19
ROW_SAMPLING = 20
CATEGORICAL, RACE_HIGH, RACE_LOW = 8, 9, 21
ACCEPT_COIN, RESIDUAL = 10, 11
MASK_ROUNDS, WORD_ROUNDS = 7, 10
_LOW = 0xFFFFFFFF


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: Tensor, rounds: int) -> tuple[Tensor, ...]:
    """Philox4x32 of broadcastable counters under int64 keys; four words as int64 in [0, 2**32)."""
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)


def domain_word(op: int, width: int) -> int:
    """Fourth counter word of an op that reads lanes of `width` bits."""
    return VERSION << 24 | op << 8 | (width.bit_length() - 1)


def lanes(key: Tensor, rows: Tensor, cols: Tensor, *, op: int, width: int, rounds: int, sample: int = 0) -> Tensor:
    """`width`-bit lanes (..., len(cols)) as int64, of the (row, key) pairs in `rows` and `key`."""
    per_block = 128 // width
    row, key = rows.unsqueeze(-1), key.unsqueeze(-1)
    s, d = torch.full_like(row, sample), torch.full_like(row, domain_word(op, width))
    words = torch.stack(philox4x32(cols // per_block, row, s, d, key, rounds), -1)
    bit = (cols % per_block) * width
    word = words.gather(-1, (bit // 32).expand(words.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return (word >> (bit % 32)) & ((1 << width) - 1)


def long_lanes(key: Tensor, sample: Tensor, first: int, count: int, *, op: int, width: int) -> Tensor:
    """Lanes (…, count) of the 64-bit indices from `first` on; key and sample are (…, 1), the rounds follow the width.

    The number of a block is a 64-bit one: its low half is j, its high half i.
    """
    per_block = 128 // width
    number = torch.arange(first // per_block, -(-(first + count) // per_block), device=key.device)
    d = torch.full_like(number, domain_word(op, width))
    rounds = MASK_ROUNDS if width <= 16 else WORD_ROUNDS
    words = torch.stack(philox4x32(number & _LOW, number >> 32, sample, d, key, rounds), -1)
    if width > 32:
        lanes_ = words[..., 0::2] | words[..., 1::2] << 32
    else:
        lanes_ = words.unsqueeze(-1) >> torch.arange(0, 32, width, device=key.device) & ((1 << width) - 1)
    return lanes_.flatten(words.dim() - 2)[..., first % per_block :][..., :count]


def sum_dtype(x: Tensor) -> torch.dtype:
    """What sums of x are held in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def block(key: Tensor, rows: Tensor, column: int, *, op: int, width: int, sample: int) -> tuple[Tensor, ...]:
    """The four words of one block of the (row, key) pairs, 10 rounds."""
    j, s, d = (torch.full_like(rows, c) for c in (column, sample, domain_word(op, width)))
    return philox4x32(j, rows, s, d, key, WORD_ROUNDS)


def race_exponential(high: Tensor, low: Tensor) -> Tensor:
    """E = −log1p(−v) in float64, v = (r64 + ½)·2⁻⁶⁴; from 1 − v where v is large."""
    v = (high.double() * 2.0**32 + (low.double() + 0.5)) * 2.0**-64
    rest = ((2.0**32 - 1 - high.double()) * 2.0**32 + (2.0**32 - 1 - low.double() + 0.5)) * 2.0**-64
    return torch.where(v < 0.25, -torch.log1p(-v), -rest.log())


def fold_in(key: Tensor, data: Tensor) -> Tensor:
    """Key derived from `key` and a 64-bit integer: the first two words of a block of its own domain."""
    zero = torch.zeros_like(data)
    domain = torch.full_like(data, domain_word(0, 128))
    r0, r1, _, _ = philox4x32(data & _LOW, (data >> 32) & _LOW, zero, domain, key, WORD_ROUNDS)
    return r0 | (r1 << 32)


def threshold(p: float | Tensor) -> int | Tensor:
    """Number of the 65536 lane values that drop. A tensor is clamped to [0, 1] and its NaN counts as 0."""
    if isinstance(p, Tensor):
        return (p.detach().double().nan_to_num(nan=0.0).clamp(0, 1) * 65536).round().long()
    return round(float(p) * 65536)


def scale(t: int | Tensor) -> float | Tensor:
    """Factor of the kept values, float64; 0 where everything is dropped."""
    if isinstance(t, Tensor):
        return torch.where(t < 65536, 65536 / (65536 - t).clamp(min=1).double(), 0.0)
    return 65536 / (65536 - t) if t < 65536 else 0.0


def count_thresholds(t: int | Tensor, samples: int) -> list[int] | Tensor:
    """T_1 … T_M in 0 … 2**32: of M masks with threshold t, k keep an element where its 32-bit lane reaches k of them.

    T_k is the law's P(fewer than k keep) at 2**-32, in integers with 46 binary places, so that no backend can differ.
    Where nothing is dropped (t = 0) one mask counts, not all M: the scale is 1; M times the float32 1/M need not be.
    """
    if isinstance(t, Tensor):  # the same in a few tensor operations a sample
        wide = torch.zeros(samples + 1, dtype=torch.int64, device=t.device)
        wide[0] = 1 << 46
        for _ in range(samples):
            wide = (wide * t + wide.roll(1) * (65536 - t) + (1 << 15)) >> 16  # the last is 0 till the last round
        thresholds = (wide[:-1].cumsum(0) + (1 << 13)) >> 14
        thresholds[1:] += (t == 0) * 2**32
        return thresholds
    mass = [1 << 46]  # of 0, 1 … kept masks
    for _ in range(samples):
        mass = [(a * t + b * (65536 - t) + (1 << 15)) >> 16 for a, b in zip([*mass, 0], [0, *mass], strict=True)]
    uncounted = (t == 0) * 2**32
    return [((below + (1 << 13)) >> 14) + (k > 0) * uncounted for k, below in enumerate(accumulate(mass[:-1]))]


def count_scale(thresholds: list[int] | Tensor) -> float | Tensor:
    """One over the mean of the counts that `thresholds` really yields, float64; 0 where all are 0."""
    if isinstance(thresholds, Tensor):
        total = (2**32 - thresholds).sum()
        return torch.where(total > 0, 2**32 / total.clamp(min=1).double(), 0.0)
    mean = sum(2**32 - t for t in thresholds)
    return 2**32 / mean if mean else 0.0


def row_keys(key: Tensor, rows: int, row_offset: int = 0) -> tuple[Tensor, Tensor]:
    """Key and stream row of each of `rows` rows: G keys share them in G runs of rows/G."""
    keys = key.reshape(-1)
    per_key = rows // max(keys.numel(), 1)
    r = torch.arange(rows, device=key.device)
    if key.dim() == 0:
        return keys.expand(rows), r + row_offset
    return keys.repeat_interleave(per_key, output_size=rows), r % max(per_key, 1) + row_offset
