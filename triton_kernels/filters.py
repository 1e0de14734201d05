"""top_k, top_p and min_p without a sort: the last token that is kept, by radix select over the bits of the logits.

The rule is that of `csrc/kernels/cpu/filters.h`. A program works on one row: three histograms of at most 2048 bins in
device memory and a search for ties, each a pass over the row (from L2 where it fits) or over what is left of it.
"""

import triton
import triton.language as tl

from .logit_tiles import INF, MAX_VOCAB, TILE, first_place, of_row, output_row, read_tile, warmth

BINS, DIGIT = tl.constexpr(2048), tl.constexpr(11)


@triton.jit
def order_key(z):
    """Integers in the order of the floats, −0 as +0; no NaN reaches this."""
    u = (z + 0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(u >> 31 == 1, 0xFFFFFFFF - u, u | 0x80000000)


@triton.jit
def from_order_key(key):
    u = tl.where(key >> 31 == 1, key & 0x7FFFFFFF, 0xFFFFFFFF - key)
    return u.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def amounts(z, row_max, inverse, units, COUNT: tl.constexpr):
    """What a token adds to its bin: an integer, so that sums do not depend on the order of the atomics."""
    if COUNT:
        return (z > -INF).to(tl.int64)
    else:
        return (tl.exp((z.to(tl.float64) - row_max) * inverse) * units + 0.5).to(tl.int64)


@triton.jit
def reach(
    budget, value, last, row, tiles, row_max, inverse, units, max_ptr, bins_ptr, logits_ptr, stride, V, uncond_ptr,
    uncond_stride, scale_ptr, exclude_ptr, num_exclude, bitmask_ptr, words, col_offset, COUNT: tl.constexpr,
):  # fmt: skip
    """The stricter of a cut and that where counts (top_k) or weights (top_p), the greatest first, reach `budget`."""
    prefix, before = tl.zeros([], tl.int64), tl.zeros([], tl.float64)
    index = tl.arange(0, BINS)
    for fixed in tl.static_range(0, 32, DIGIT):
        low = 32 - fixed - DIGIT if fixed + DIGIT <= 32 else 0
        count = BINS if fixed + DIGIT <= 32 else 1 << (32 - fixed)
        tl.store(bins_ptr + index, tl.zeros([BINS], tl.int64))
        tl.debug_barrier()
        for tile in range(0, tiles):
            if order_key(tl.load(max_ptr + tile)) >> (32 - fixed) >= prefix:
                z, _nan = read_tile(
                    row, True, tile, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr,
                    exclude_ptr, num_exclude, bitmask_ptr, words, col_offset,
                )  # fmt: skip
                key = order_key(z)
                amount = amounts(z, row_max, inverse, units, COUNT)
                place = (key >> low) & (count - 1)
                tl.atomic_add(bins_ptr + place, amount, mask=(key >> (32 - fixed) == prefix) & (amount > 0))
        tl.debug_barrier()
        in_bin = tl.load(bins_ptr + count - 1 - index, mask=index < count, other=0, cache_modifier=".cg")
        weight = in_bin.to(tl.float64)
        sums = tl.cumsum(weight, 0)
        if fixed == 0 and not COUNT:
            budget *= tl.max(sums, 0)
        at, below, _above = first_place(index, weight, sums, before + sums >= budget)
        before += below
        prefix = prefix * count + (count - 1 - at)
        tl.debug_barrier()
    limit = from_order_key(prefix)
    each = tl.max(amounts(tl.full([2], 0.0, tl.float32) + limit, row_max, inverse, units, COUNT), 0).to(tl.float64)
    wanted = tl.maximum((budget - before) / tl.maximum(each, 1.0), 1.0)
    # Of the tokens equal to the limit, the one with which there are as many as wanted, by index.
    seen, found = tl.zeros([], tl.float64), tl.zeros([], tl.int64)
    for tile in range(0, tiles):
        if (tl.load(max_ptr + tile) >= limit) & (seen < wanted):
            z, _nan = read_tile(
                row, True, tile, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr,
                num_exclude, bitmask_ptr, words, col_offset,
            )  # fmt: skip
            equal = (z == limit).to(tl.float64)
            running = seen + tl.cumsum(equal, 0)
            at, below, _above = first_place(tl.arange(0, TILE), equal, running, running >= wanted)
            more = tl.sum(equal, 0)
            found = tl.where(more > 0, tile * TILE + at, found).to(tl.int64)
            seen += more
    stricter = (limit > value) | ((limit == value) & (found < last))
    return tl.where(stricter, limit, value), tl.where(stricter, found, last)


@triton.jit
def categorical_cuts_kernel(
    chosen_ptr, rows: tl.int64, tiles, temperature_ptr, max_ptr, sum_ptr, value_ptr, last_ptr, bins_ptr, top_k_ptr,
    top_p_ptr, min_p_ptr, logits_ptr, stride: tl.int64, V: tl.int64, uncond_ptr, uncond_stride: tl.int64, scale_ptr,
    exclude_ptr, num_exclude, bitmask_ptr, words: tl.int64, col_offset: tl.int64, requests, WARM_ROWS: tl.constexpr,
    K_ROWS: tl.constexpr, P_ROWS: tl.constexpr, MIN_ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The last token that the filters of a row keep; they are those of the row, or of request `out` mod `requests`."""
    out = tl.program_id(0).to(tl.int64)
    row, valid = output_row(chosen_ptr, out, rows)
    owner = row if requests is None else out % requests
    t, _greedy = warmth(temperature_ptr, owner, WARM_ROWS)
    inverse = 1.0 / t
    index = tl.arange(0, TILES)
    max_ptr, sum_ptr, bins_ptr = max_ptr + out * tiles, sum_ptr + out * tiles, bins_ptr + out * BINS
    tops = tl.load(max_ptr + index, mask=index < tiles, other=-INF)
    row_max = tl.max(tops, 0).to(tl.float64)
    value, last = tl.full([], -INF, tl.float32), tl.full([], MAX_VOCAB, tl.int64)
    if valid & (row_max > -INF) & (row_max < INF):
        sums = tl.load(sum_ptr + index, mask=index < tiles, other=0.0)
        whole = tl.sum(sums * tl.exp((tops.to(tl.float64) - row_max) * inverse), 0)
        # 2^61 over the power of two below the row's weight, which is known to 2^-18.
        exponent = whole.to(tl.int64, bitcast=True) >> 52
        units = ((1023 + 61 + 1023 - exponent) << 52).to(tl.float64, bitcast=True)
        if top_k_ptr is not None:
            k = tl.maximum(of_row(top_k_ptr, owner, K_ROWS), 1)
            if k < V:
                value, last = reach(
                    k.to(tl.float64), value, last, row, tiles, row_max, inverse, units, max_ptr, bins_ptr, logits_ptr,
                    stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr, num_exclude, bitmask_ptr, words,
                    col_offset, True,
                )  # fmt: skip
        if top_p_ptr is not None:
            p = of_row(top_p_ptr, owner, P_ROWS)
            if p < 1.0:
                value, last = reach(
                    tl.maximum(p, 0.0), value, last, row, tiles, row_max, inverse, units, max_ptr, bins_ptr, logits_ptr,
                    stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr, num_exclude, bitmask_ptr, words,
                    col_offset, False,
                )  # fmt: skip
        if min_p_ptr is not None:
            p = of_row(min_p_ptr, owner, MIN_ROWS)
            if p > 0.0:
                bound = tl.log(tl.minimum(p, 1.0))
                low, high = tl.full([], 0x7FFFFF, tl.int64), order_key(row_max.to(tl.float32))  # from −inf on
                for _ in range(0, 32):
                    middle = low + (high - low) // 2
                    enough = (from_order_key(middle).to(tl.float64) - row_max) * inverse >= bound
                    low, high = tl.where(enough | (low == high), low, middle + 1), tl.where(enough, middle, high)
                limit = from_order_key(low)
                last = tl.where(limit > value, MAX_VOCAB, last).to(tl.int64)
                value = tl.maximum(limit, value)
    tl.store(value_ptr + out, value)
    tl.store(last_ptr + out, last)
