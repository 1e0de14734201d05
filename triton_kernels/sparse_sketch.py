"""`sparse_sketch`: Y_k = S_k A, X = Σ S_kᵀ Y_k and the nonzeros of CountSketch and SJLT, where there is no CUDA kernel.

Triton cannot scatter without atomics, so a tile of S, 0 and ±1, is made by comparing rows and multiplied on tensor cores,
without rounding as in `dense_sketch`. Of SJLT's nnz nonzeros a column only those whose block of rows meets the tile are
drawn, a quarter of a Philox call each. Flops: 2 d m n, as if S were dense; the CUDA kernel needs 2 nnz m n.
The adjoint gathers: nnz reads of Y for an element of X, one write. Sums are taken in a fixed order.
"""

import torch
import triton
import triton.language as tl
from randfuse.reference import streams

from . import launch, philox
from .dense_sketch import add_signed, load_tile, parts_of, store_tile

DOMAIN = tl.constexpr(streams.domain_word(streams.SKETCH_INDEX, 32))
STEP = tl.constexpr(128)  # columns of S at a time


@triton.jit
def nonzeros(key, t, step, first, size):
    """Rows, int64, and signs, float32, (STEP,) of nonzero t, which lies in rows [first, first + size)."""
    block = step * (STEP // 4)
    j = block.to(tl.uint32) + tl.arange(0, STEP // 4).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    t = (block * 0 + t).to(tl.uint32)  # in the interpreter it comes as a number
    r0, r1, r2, r3 = tl.philox(key, j, high, t, DOMAIN, philox.WORD_ROUNDS)
    word = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [STEP])
    row = first + ((word >> 1).to(tl.int64) * size >> 31)
    return row, 1.0 - 2.0 * (word & 1).to(tl.float32)


@triton.jit(do_not_specialize=("row_begin", "row_end", "first", "shift"))
def sparse_sketch_kernel(
    a_ptr, key_ptr, y_ptr, row_stride: tl.int64, col_stride: tl.int64, m: tl.int64, n: tl.int64, count: tl.int64,
    part: tl.int64, d: tl.int64, nnz: tl.int64, row_begin, row_end, first, shift, scale,
    DOWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (parts, K, rows, n): part p sums stream columns [p * part, (p + 1) * part) from the step of col_offset on."""
    if DOWN:
        row_stride = 1
    else:
        col_stride = 1
    rows, first = (row_end - row_begin).to(tl.int64), first.to(tl.int64)
    pid = tl.program_id(0).to(tl.int64)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N)
    row = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = pid // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    place = pid // (tiles_m * tiles_n)  # part, operator
    key = tl.load(key_ptr + place % count)
    # Blocks of rows floor(t d / nnz) to floor((t + 1) d / nnz) that meet the tile.
    low = row_begin + pid % tiles_m * BLOCK_M
    high = tl.minimum(low + BLOCK_M, row_end)
    t_begin, t_end = ((low + 1) * nnz - 1) // d, (high * nnz - 1) // d + 1
    begin = place // count * part
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(begin, tl.minimum(begin + part, m + shift), STEP):
        s = tl.zeros([BLOCK_M, STEP], tl.bfloat16)
        for t in range(t_begin, t_end):
            start = t * d // nnz
            target, sign = nonzeros(key, t, first + at // STEP, start, (t + 1) * d // nnz - start)
            here = (row + row_begin).to(tl.int32)[:, None] == target.to(tl.int32)[None, :]
            s = tl.where(here, sign.to(tl.bfloat16)[None, :], s)
        k = at - shift + tl.arange(0, STEP)
        acc = add_signed(s, load_tile(a_ptr, k, m, row_stride, col, n, col_stride), acc)
    store_tile(y_ptr + place * rows * n, acc * scale, row, rows, col, n)


@triton.jit(do_not_specialize=("row_begin", "row_end", "first", "shift"))
def sparse_sketch_adjoint_kernel(
    y_ptr, key_ptr, x_ptr, n: tl.int64, count: tl.int64, cols: tl.int64, d: tl.int64, nnz: tl.int64,
    row_begin, row_end, first, shift, scale, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x (cols, n), tiles (STEP, BLOCK_N)."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_n = tl.cdiv(n, BLOCK_N)
    at, col = pid // tiles_n, pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (row_end - row_begin).to(tl.int64)
    acc = tl.zeros([STEP, BLOCK_N], tl.float32)
    for e in range(0, count * nnz):
        k, t = e // nnz, e % nnz
        start = t * d // nnz
        row, sign = nonzeros(tl.load(key_ptr + k), t, first + at, start, (t + 1) * d // nnz - start)
        acc += sign[:, None] * load_tile(y_ptr + k * rows * n, row - row_begin, rows, n, col, n, 1).to(tl.float32)
    store_tile(x_ptr, acc * scale, at * STEP - shift + tl.arange(0, STEP), cols, col, n)


@triton.jit(do_not_specialize=("first", "shift"))
def sparse_sketch_entries_kernel(key_ptr, row_ptr, sign_ptr, cols: tl.int64, d: tl.int64, nnz: tl.int64, first, shift):
    """rows and signs (K, nnz, cols), STEP of a nonzero."""
    pid = tl.program_id(0).to(tl.int64)
    steps = tl.cdiv(cols + shift, STEP)
    e, at = pid // steps, pid % steps
    t = e % nnz
    start = t * d // nnz
    row, sign = nonzeros(tl.load(key_ptr + e // nnz), t, first + at, start, (t + 1) * d // nnz - start)
    c = at * STEP - shift + tl.arange(0, STEP)
    inside = (c >= 0) & (c < cols)
    tl.store(row_ptr + e * cols + c, row, mask=inside)
    tl.store(sign_ptr + e * cols + c, sign.to(tl.int8), mask=inside)


@launch.op(
    "sparse_sketch(Tensor a, Tensor key, SymInt d, SymInt nnz, SymInt row_begin, SymInt row_end, SymInt col_offset) -> Tensor"
)
def sparse_sketch(a, key, d, nnz, row_begin, row_end, col_offset):
    launch.floating("sparse_sketch", a=a)
    if a.dim() != 2:
        raise ValueError(f"sparse_sketch: a must have shape (m, n), got {tuple(a.shape)}")
    place = _place("sparse_sketch", key, a.device, d, nnz, row_begin, row_end, col_offset, a.shape[0])
    (m, n), count, rows = a.shape, key.shape[0], row_end - row_begin
    y = a.new_empty((count, rows, n), dtype=torch.float32)
    if y.numel() == 0:
        return y
    down = a.stride(1) != 1 and a.stride(0) == 1
    a = a if down or a.stride(1) == 1 else a.contiguous()
    tile = {"BLOCK_M": 16, "BLOCK_N": 16} if launch.INTERPRETED else {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8}
    tiles = count * triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    part, parts = parts_of(m, place["shift"], tiles, STEP.value)
    sums = y if parts == 1 else y.new_empty((parts, *y.shape))
    sparse_sketch_kernel[(parts * tiles,)](
        a, key.contiguous(), sums, *a.stride(), m, n, count, part, **place, row_begin=row_begin, row_end=row_end,
        scale=nnz**-0.5, DOWN=down, **tile,
    )  # fmt: skip
    return y if parts == 1 else sums.sum(0)


@launch.op(
    "sparse_sketch_adjoint(Tensor y, Tensor key, SymInt d, SymInt nnz, SymInt row_begin, SymInt row_end, SymInt col_offset,"
    " SymInt cols) -> Tensor"
)
def sparse_sketch_adjoint(y, key, d, nnz, row_begin, row_end, col_offset, cols):
    launch.floating("sparse_sketch_adjoint", y=y)
    place = _place("sparse_sketch_adjoint", key, y.device, d, nnz, row_begin, row_end, col_offset, cols)
    launch.sketched("sparse_sketch_adjoint", y, key, row_end - row_begin)
    x = y.new_empty((cols, y.shape[2]), dtype=torch.float32)
    if x.numel() != 0:
        tile = {"BLOCK_N": 32}
        tiles = triton.cdiv(cols + place["shift"], STEP.value) * triton.cdiv(y.shape[2], tile["BLOCK_N"])
        sparse_sketch_adjoint_kernel[(tiles,)](
            y.contiguous(), key.contiguous(), x, y.shape[2], key.shape[0], cols, **place, row_begin=row_begin,
            row_end=row_end, scale=nnz**-0.5, **tile,
        )  # fmt: skip
    return x


@launch.op(
    "sparse_sketch_entries(Tensor key, SymInt d, SymInt nnz, SymInt col_offset, SymInt cols) -> (Tensor, Tensor)"
)
def sparse_sketch_entries(key, d, nnz, col_offset, cols):
    place = _place("sparse_sketch_entries", key, key.device, d, nnz, 0, d, col_offset, cols)
    rows = key.new_empty((key.shape[0], nnz, cols))
    signs = rows.new_empty(rows.shape, dtype=torch.int8)
    if cols != 0:
        steps = key.shape[0] * nnz * triton.cdiv(cols + place["shift"], STEP.value)
        sparse_sketch_entries_kernel[(steps,)](key.contiguous(), rows, signs, cols, **place)
    return rows, signs


def _place(op, key, device, d, nnz, row_begin, row_end, col_offset, cols):
    """Kernel arguments of an operator's block, checked as the binding does."""
    launch.sketch(op, key, device, d, row_begin, row_end, col_offset, cols)
    if not 1 <= nnz <= min(d, 1024):
        raise ValueError(f"{op}: nnz must be in [1, min(d, 1024)], got {nnz}")
    return {"d": d, "nnz": nnz, "first": col_offset // STEP.value, "shift": col_offset % STEP.value}
