"""Random streams on the device: which lane decides about which element (docs/streams.md).

A tile of decisions starts at a multiple of 8 *stream* columns, so that one Philox block gives eight neighbouring
columns and no tile ever splits a block. Kernels reach that for any col_offset by shifting their tiles against the matrix:
with shift = col_offset % 8, column 0 of the first tile is matrix column -shift, which is masked off. An aligned offset
(shift = 0, known to the compiler as a multiple of 16) costs nothing; any other one only loses vectorised access.
"""

import triton
import triton.language as tl
from randfuse.reference import streams

LANES = tl.constexpr(8)  # 16-bit lanes of one block
MASK_ROUNDS = tl.constexpr(streams.MASK_ROUNDS)
WORD_ROUNDS = tl.constexpr(streams.WORD_ROUNDS)
INPUT_DOMAIN = tl.constexpr(streams.domain_word(streams.DROPOUT, 16))
OUTPUT_DOMAIN = tl.constexpr(streams.domain_word(streams.OUTPUT_DROPOUT, 16))
WEIGHT_DOMAIN = tl.constexpr(streams.domain_word(streams.WEIGHT_MASK, 16))
FOLD_DOMAIN = tl.constexpr(streams.domain_word(0, 128))
ROUND = tl.constexpr(2.0**52)  # float64 has no fraction bits from here on: adding it rounds, half to even


@triton.jit
def drop_rate(p_ptr, threshold, scale):
    """(threshold, scale), of the p in device memory if there is one: clamped to [0, 1], NaN = 0."""
    if p_ptr is None:
        return threshold.to(tl.uint32), scale
    else:
        p = tl.load(p_ptr)
        if p.dtype != tl.float64:
            p = p.to(tl.float32)
        p = p.to(tl.float64)
        q = tl.where(p > 0, tl.where(p < 1, p, 1.0), 0.0) * 65536.0
        t = ((q + ROUND) - ROUND).to(tl.int32)
        kept = tl.maximum(65536 - t, 1).to(tl.float64)
        return t.to(tl.uint32), tl.where(t < 65536, 65536.0 / kept, 0.0).to(tl.float32)


@triton.jit
def stream_rows(key_ptr, rows, limit, rows_per_key, row_offset):
    """Key and stream row of the matrix rows `rows` < `limit`; rows_per_key is None where one key serves them all."""
    if rows_per_key is None:
        return tl.load(key_ptr), (rows + row_offset).to(tl.uint32)
    else:
        run = rows // rows_per_key
        key = tl.load(key_ptr + run, mask=rows < limit, other=0)
        return key[:, None], (rows - run * rows_per_key + row_offset).to(tl.uint32)


@triton.jit
def sample_rows(first, offsets, limit, samples, sample):
    """Matrix rows, their number, sub-streams and places in a (samples, matrix rows) result of the rows first + offsets,
    below `limit`, of a head, in which all samples of a matrix row follow one another: the cache serves them from one read.
    """
    if samples is None:
        return first + offsets, limit, sample, first + offsets
    else:
        row = first // samples
        place = (first - row * samples).to(tl.int32) + offsets  # 32 bits: the tile is spared 64-bit divisions
        m = place % samples
        row += place // samples
        height = limit // samples
        return row, height, (m + sample).to(tl.uint32)[:, None], m * height + row


@triton.jit
def lanes16(key, row, block, sample, domain, COLS: tl.constexpr):
    """Lanes (ROWS, COLS) as uint32 of the stream rows `row` (ROWS,), from column 8 * `block` on."""
    j = block.to(tl.uint32) + tl.arange(0, COLS // LANES).to(tl.uint32)
    # The first two of the seven rounds depend on the row or on the column alone and run on vectors, not on the tile.
    r0, r1, r2, r3 = tl.philox(key, j[None, :], row[:, None], sample, domain, MASK_ROUNDS)
    # Words hold column pairs, low half first: the index (word bit 1, word bit 0, half) is appended axis by axis.
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [row.shape[0], COLS])


@triton.jit
def keep_tile(key, row, block, sample, domain, threshold, COLS: tl.constexpr):
    """Decisions (ROWS, COLS), True = kept."""
    return lanes16(key, row, block, sample, domain, COLS) >= threshold


@triton.jit
def fold_in(key, data):
    """Key derived from `key` and the 64-bit `data`, both int64."""
    low = data.to(tl.uint32)
    high = (data >> 32).to(tl.uint32)
    r0, r1, _, _ = tl.philox(key, low, high, low ^ low, FOLD_DOMAIN, WORD_ROUNDS)
    return ((r1.to(tl.uint64) << 32) | r0.to(tl.uint64)).to(tl.int64)
