"""Statistics of a tile, and draws from a row by them: what categorical_sample and speculative_accept are made of."""

import triton
import triton.language as tl
from randfuse.reference import streams

from . import philox
from .logit_tiles import INF, NONE, TILE, pick, read_tile, two_artanh

SUM_ERROR = tl.constexpr(2.0**-18)  # of a float32 tile sum, relative: csrc/kernels/common/categorical.h
HIGH_DOMAIN = tl.constexpr(streams.domain_word(streams.RACE_HIGH, 32))
LOW_DOMAIN = tl.constexpr(streams.domain_word(streams.RACE_LOW, 32))


@triton.jit
def exponentials(z, t):
    """The maximum of a tile, x = (z − max) / T in units of log 2 and 2^x; −inf and 0 where it is not finite."""
    top = tl.max(z, 0)
    finite = (top > -INF) & (top < INF)
    slope = (1.4426950408889634 / t).to(tl.float32)
    below = tl.where(z > -INF, z, 0.0) - tl.where(finite, top, 0.0)
    x = tl.where(finite, tl.where(z > -INF, below, -INF), -INF) * slope
    return top, x, tl.exp2(x)


@triton.jit
def tile_dot(e, x):
    """Σ exp(x) x of a tile, of natural exponents."""
    return 0.6931471805599453 * tl.sum(e * tl.maximum(x, -125.0), 0).to(tl.float64)


@triton.jit
def race_score(z, high, key, i, j, draw, lane, t, greedy):
    """z / T − log E of one token in float64, with the low word too; z where greedy."""
    r0, r1, r2, r3 = tl.philox(key, j, i, draw, LOW_DOMAIN, philox.WORD_ROUNDS)
    word = tl.where(lane == 0, r0, tl.where(lane == 1, r1, tl.where(lane == 2, r2, r3)))
    low = word.to(tl.uint32).to(tl.int64).to(tl.float64)
    high = high.to(tl.float64)
    v = (high * 2.0**32 + (low + 0.5)) * 2.0**-64
    rest = ((4294967295.0 - high) * 2.0**32 + (4294967295.0 - low + 0.5)) * 2.0**-64
    e = tl.where(v < 0.25, two_artanh(v / (2.0 - v)), -tl.log(rest))
    return tl.where(greedy, z.to(tl.float64), z.to(tl.float64) / t - tl.log(e))


@triton.jit
def race_tile(z, tile, col_offset, key, i, draw, t, greedy):
    """The winner of a tile and its score; −inf where nothing can be drawn.

    E ≥ v bounds scores in float32; tokens that may reach the leader's are scored in float64.
    """
    first = (col_offset + tile * TILE) // 4
    j = (first + tl.arange(0, TILE // 4)).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(key, j, i, draw, HIGH_DOMAIN, philox.WORD_ROUNDS)
    high = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [TILE]).to(tl.uint32)
    bits = (high >> 8).to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
    bound = bits * (-0.6931471805599453 * 2.0**-23) + (z * (1.0 / t).to(tl.float32) + 0.6931471805599453 * 151.0)
    bound = tl.where(greedy, z, bound)
    high = high.to(tl.int64)

    index = tl.arange(0, TILE)
    reaches = tl.max(bound, 0)
    best, winner = tl.full([], -INF, tl.float64), tl.zeros([], tl.int64)
    if reaches > -INF:
        at = tl.min(tl.where(bound == reaches, index, NONE), 0)
        left = index == at
        count = tl.full([], 1, tl.int32)
        for turn in range(0, 2):  # the leader, then all that may beat it
            for _ in range(0, count):
                at = tl.min(tl.where(left, index, NONE), 0)
                left = left & (index != at)
                own_z = tl.max(tl.where(index == at, z, -INF), 0)
                own_high = tl.max(tl.where(index == at, high, 0), 0)
                score = race_score(own_z, own_high, key, i, (first + at // 4).to(tl.uint32), draw, at % 4, t, greedy)
                token = tile * TILE + at
                better = (score > best) | ((score == best) & (token < winner))
                best, winner = tl.where(better, score, best), tl.where(better, token, winner)
            reached = tl.minimum(best, 3e38)
            floor = (reached - 2.0**-20 * (tl.abs(reached) + 220.0)).to(tl.float32)
            left = (bound >= floor) & (tile * TILE + index != winner) & (turn == 0)
            count = tl.where(greedy, 0, tl.sum(left.to(tl.int32), 0))  # whose leader is the first of equals
    return best, winner


@triton.jit
def coin53(low, high):
    low, high = low.to(tl.uint32).to(tl.int64), high.to(tl.uint32).to(tl.int64)
    return ((high << 21) | (low >> 11)).to(tl.float64) * 2.0**-53


@triton.jit
def draw_by_mass(
    u, v, banned, tops, sums, row_max, inverse, tiles, row, valid, value, last, logits_ptr, stride, V, uncond_ptr,
    uncond_stride, scale_ptr, exclude_ptr, num_exclude, bitmask_ptr, words, col_offset,
):  # fmt: skip
    """A token other than `banned` by inverse CDF, u for its tile and v for its place in it; the tiles' sums.

    Sums are taken again in float64 where the coin fell near the edge of a tile.
    """
    index, local = tl.arange(0, tops.shape[0]), tl.arange(0, TILE)
    share = tl.exp((tops.to(tl.float64) - row_max) * inverse)
    at, before, after, total = pick(index, sums * share, u)
    slack = SUM_ERROR * total
    is_last = tl.max(tl.where(index > at, sums * share, 0.0), 0) == 0
    sure = ((before == 0) | (u * total - before >= slack)) & (is_last | (after - u * total >= slack))
    if sure == 0:
        for k in range(0, tiles):
            z, _nan = read_tile(
                row, valid, k, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr,
                num_exclude, bitmask_ptr, words, col_offset,
            )  # fmt: skip
            z = tl.where(local + k * TILE == banned, -INF, z)
            top = tl.max(z, 0)
            exact = tl.sum(tl.exp((z.to(tl.float64) - tl.where(top > -INF, top, 0.0)) * inverse), 0)
            sums = tl.where((index == k) & (sums > 0), exact, sums)
        at, before, after, total = pick(index, sums * share, u)
    z, _nan = read_tile(
        row, valid, at, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr,
        num_exclude, bitmask_ptr, words, col_offset,
    )  # fmt: skip
    z = tl.where(local + at * TILE == banned, -INF, z)
    place, before, after, total = pick(local, tl.exp((z.to(tl.float64) - tl.max(z, 0)) * inverse), v)
    return at.to(tl.int64) * TILE + place, sums
