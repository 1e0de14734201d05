"""Rows of raw logits in tiles of 1024, and draws from float64 weights: what kernels that sample are made of."""

import math

import triton
import triton.language as tl
from randfuse import _sampling

TILE = tl.constexpr(1024)
MAX_VOCAB = tl.constexpr(_sampling.MAX_VOCAB)
NONE = tl.constexpr(2**30)  # above every index
INF = tl.constexpr(math.inf)


@triton.jit
def output_row(chosen_ptr, out, rows):
    """Row of the logits of an output row, and whether there is one."""
    if chosen_ptr is None:
        return out, out < rows
    else:
        row = tl.load(chosen_ptr + out)
        valid = (row >= 0) & (row < rows)
        return tl.where(valid, row, 0), valid


@triton.jit
def of_row(ptr, row, per_row: tl.constexpr):
    return tl.load(ptr + row) if per_row else tl.load(ptr)


@triton.jit
def warmth(ptr, row, per_row: tl.constexpr):
    """Temperature, 1 where it is 0; whether it is."""
    t = of_row(ptr, row, per_row)
    warm = t > 0
    return tl.where(warm, tl.minimum(tl.maximum(t, 2.0**-100), 2.0**100), 1.0), warm == 0


@triton.jit
def read_tile(
    row, valid, tile, cut_value, cut_last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr,
    num_exclude, bitmask_ptr, words, col_offset,
):  # fmt: skip
    """Logits (TILE,) of a tile in float32, −inf where no token is or none is allowed, and whether one is NaN."""
    token = tile * TILE + tl.arange(0, TILE)
    inside = (token < V) & valid
    z = tl.load(logits_ptr + row * stride + token, mask=inside, other=-INF).to(tl.float32)
    if uncond_ptr is not None:
        u = tl.load(uncond_ptr + row * uncond_stride + token, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, u + tl.load(scale_ptr) * (z - u), -INF)
    if exclude_ptr is not None:
        for e in range(0, num_exclude):
            z = tl.where(token + col_offset == tl.load(exclude_ptr + e), -INF, z)
    if bitmask_ptr is not None:
        word = tl.load(bitmask_ptr + row * words + token // 32, mask=inside, other=0)
        z = tl.where((word >> (token % 32).to(tl.int32)) & 1 == 1, z, -INF)
    nan = tl.max((z != z).to(tl.int32), 0)
    z = tl.where(z == z, z, -INF)
    kept = (z > cut_value) | ((z == cut_value) & (token <= cut_last))
    return tl.where(kept, z, -INF), nan


@triton.jit
def first_place(index, weight, prefix, passed):
    """The first place with a weight that passed, the last with a weight if none did; the sums before and with it."""
    at = tl.min(tl.where(passed & (weight > 0), index, NONE), 0)
    at = tl.where(at == NONE, tl.max(tl.where(weight > 0, index, 0), 0), at)
    before = tl.max(tl.where(index < at, prefix, 0.0), 0)
    after = tl.max(tl.where(index <= at, prefix, 0.0), 0)
    return at, before, after


@triton.jit
def pick(index, weight, u):
    """The first place whose prefix exceeds u times the whole; the sums before it, with it and of all."""
    prefix = tl.cumsum(weight, 0)
    total = tl.max(prefix, 0)
    at, before, after = first_place(index, weight, prefix, prefix > u * total)
    return at, before, after, total


@triton.jit
def two_artanh(s):
    q = s * s
    p = q * (2.0 / 23) + 2.0 / 21
    p = p * q + 2.0 / 19
    p = p * q + 2.0 / 17
    p = p * q + 2.0 / 15
    p = p * q + 2.0 / 13
    p = p * q + 2.0 / 11
    p = p * q + 2.0 / 9
    p = p * q + 2.0 / 7
    p = p * q + 2.0 / 5
    p = p * q + 2.0 / 3
    return p * q * s + 2.0 * s


@triton.jit
def cut_of(value_ptr, last_ptr, out):
    """No cut: every token that is allowed is kept."""
    if value_ptr is None:
        return -INF, MAX_VOCAB
    else:
        return tl.load(value_ptr + out), tl.load(last_ptr + out)
