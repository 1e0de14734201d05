"""`dense_sketch`: Y_k = S_k A and X = Σ S_kᵀ Y_k for Gaussian and Rademacher operators whose entries are made in the tile.

Bytes: A once for each BLOCK_M rows of Y (later reads mostly from L2), Y once; S costs none. A sign costs 1/128 of a
Philox call, a normal 1/4 of one and half a Box–Muller pair, and serves BLOCK_N columns of A.
Flops: 2 d m n. ±1 is exact in bfloat16, and a float32 is the exact sum of three bfloat16 (8 bits of significand each), so
three products on tensor cores with float32 sums are as accurate as float32: 790/3 against 60 TFLOP/s on an H200. A normal
needs its 24 bits, so Gaussian products are those of float32 in six bfloat16 products (`bf16x6`).

The sum over m is cut by the shape alone; the parts are added in a fixed order. All places are 64-bit.
"""

import torch
import triton
import triton.language as tl
from randfuse.reference import streams

from . import launch, philox
from .gemm import INTERPRETED, dot

SIGN_DOMAIN = tl.constexpr(streams.domain_word(streams.SKETCH_SIGN, 1))
NORMAL_DOMAIN = tl.constexpr(streams.domain_word(streams.SKETCH_NORMAL, 32))
SIGNS = tl.constexpr(128)  # columns of S in a Philox block
SIX_PRODUCTS = tl.constexpr("ieee" if launch.INTERPRETED else "bf16x6")  # the interpreter knows no other
PARTS = 256  # programs that a product is cut into at least, where m allows


def _constants(*digits):
    return [tl.constexpr(float.fromhex(d)) for d in digits]


# As in csrc/kernels/common/normal.h.
L0, L1, L2, L3, L4, L5, L6, L7, L8, LN2 = _constants(
    "0x1.14573ep-4", "-0x1.de3bf8p-4", "0x1.e6f08cp-4", "-0x1.fc220ep-4", "0x1.233766p-3", "-0x1.555c4ep-3",
    "0x1.99a4b6p-3", "-0x1.000006p-2", "0x1.555548p-2", "0x1.62e43p-1",
)  # fmt: skip
S0, S1, S2, S3, S4, HALF_PI = _constants(
    "0x1.4bc256p-13", "-0x1.32ca86p-8", "0x1.466bbap-4", "-0x1.4abbcep-1", "-0x1.777a5cp-25", "0x1.921fb6p+0"
)
C0, C1, C2, C3 = _constants("0x1.d9f7bap-11", "-0x1.55c664p-6", "0x1.03c1dep-2", "-0x1.3bd3ccp+0")


@triton.jit
def fma(a, b, c):
    """Rounded once, in the interpreter too, whose own rounds twice."""
    if INTERPRETED:
        a = a.to(tl.float64)
        return (a * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def radius(word):
    """√(−2 ln u) of u = (word | 1) / 2³²."""
    odd = (word >> 16).to(tl.float32) * 65536.0 + ((word & 0xFFFF) | 1).to(tl.float32)
    bits = odd.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    p = fma(f, L0, L1)
    p = fma(p, f, L2)
    p = fma(p, f, L3)
    p = fma(p, f, L4)
    p = fma(p, f, L5)
    p = fma(p, f, L6)
    p = fma(p, f, L7)
    p = fma(p, f, L8)
    log1p = fma(f * f, fma(p, f, -0.5), f)
    return tl.sqrt_rn(-2.0 * fma((k - 32).to(tl.float32), LN2, log1p))


@triton.jit
def turn(word):
    """(cos, sin) of (π/2)(q + x): q the upper 2 bits, x in [−½, ½) the others."""
    x = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    t = x * x
    s = fma(t, S0, S1)
    s = fma(s, t, S2)
    s = fma(s, t, S3)
    s = fma(x, HALF_PI, x * fma(s, t, S4))
    c = fma(t, C0, C1)
    c = fma(c, t, C2)
    c = fma(c, t, C3)
    c = fma(c, t, 1.0)
    swapped = (word & 0x40000000) != 0
    cosine, sine = tl.where(swapped, s, c), tl.where(swapped, c, s)
    half_turn = (word & 0x80000000) != 0
    return tl.where(half_turn != swapped, -cosine, cosine), tl.where(half_turn, -sine, sine)


@triton.jit
def words(key, block, rows, COLS: tl.constexpr):
    """(ROWS, COLS / 2): the 16 words from Philox block `block` on and, 8 blocks for each 32 columns, those of the others."""
    i = tl.arange(0, COLS // 8)
    j = block.to(tl.uint32) + (i // 4 * 8 + i % 4).to(tl.uint32)  # no carry: a step starts at a multiple of COLS / 4
    high = (block >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(key, j[None, :], high, rows[:, None], NORMAL_DOMAIN, philox.WORD_ROUNDS)
    return tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [rows.shape[0], COLS // 2])


@triton.jit
def normals(key, step, rows, COLS: tl.constexpr):
    """Two tiles (ROWS, COLS / 2): columns `normal_columns` of a step of the operator's `rows`, and 16 further on."""
    r = radius(words(key, step * (COLS // 4), rows, COLS))
    cosine, sine = turn(words(key, step * (COLS // 4) + 4, rows, COLS))
    return r * cosine, r * sine


@triton.jit
def normal_columns(COLS: tl.constexpr):
    i = tl.arange(0, COLS // 2)
    return i // 16 * 32 + i % 16


@triton.jit
def signs(key, step, rows):
    """±1 (ROWS, SIGNS) as float32."""
    high = (step >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(key, step.to(tl.uint32), high, rows, SIGN_DOMAIN, philox.MASK_ROUNDS)
    w = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [rows.shape[0], 4, 1])
    bits = (w >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) << 31
    return tl.reshape((bits | 0x3F800000).to(tl.float32, bitcast=True), [rows.shape[0], SIGNS])


@triton.jit
def add_signed(s, x, acc):
    """acc + s @ x for s of ±1, x without rounding: float32 goes in three parts, whose leading bits are cut off in turn."""
    if x.dtype == tl.float32:
        for _ in tl.static_range(3):
            part = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
            acc = dot(s.to(tl.bfloat16), part.to(tl.bfloat16), acc)
            exact = x == part  # infinity too, of which nothing is left
            x = tl.where(exact, 0.0, x) - tl.where(exact, 0.0, part)
        return acc
    else:
        return dot(s.to(x.dtype), x, acc)


@triton.jit
def add_normal(s, x, acc):
    return tl.dot(s, x.to(tl.float32), acc, input_precision=SIX_PRODUCTS)


@triton.jit
def load_tile(ptr, row, rows, row_stride, col, cols, col_stride):
    inside = ((row >= 0) & (row < rows))[:, None] & (col < cols)[None, :]
    return tl.load(ptr + row[:, None] * row_stride + col[None, :] * col_stride, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, tile, row, rows, col, cols):
    inside = ((row >= 0) & (row < rows))[:, None] & ((col >= 0) & (col < cols))[None, :]
    tl.store(ptr + row[:, None] * cols + col[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=("row_begin", "first", "shift"))
def dense_sketch_kernel(
    a_ptr, key_ptr, y_ptr, row_stride: tl.int64, col_stride: tl.int64, m: tl.int64, n: tl.int64, count: tl.int64,
    rows: tl.int64, part: tl.int64, row_begin, first, shift, scale,
    GAUSSIAN: tl.constexpr, STEP: tl.constexpr, DOWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (parts, K, rows, n): part p sums stream columns [p * part, (p + 1) * part) from the step of col_offset on."""
    if DOWN:
        row_stride = 1
    else:
        col_stride = 1
    first = first.to(tl.int64)
    pid = tl.program_id(0).to(tl.int64)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N)
    row = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)  # neighbours read the same A
    col = pid // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    place = pid // (tiles_m * tiles_n)  # part, operator
    key = tl.load(key_ptr + place % count)
    s_row = (row + row_begin).to(tl.uint32)
    begin = place // count * part
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(begin, tl.minimum(begin + part, m + shift), STEP):
        step = first + at // STEP
        if GAUSSIAN:
            cosine, sine = normals(key, step, s_row, STEP)
            k = at - shift + normal_columns(STEP)
            acc = add_normal(cosine, load_tile(a_ptr, k, m, row_stride, col, n, col_stride), acc)
            acc = add_normal(sine, load_tile(a_ptr, k + 16, m, row_stride, col, n, col_stride), acc)
        else:
            k = at - shift + tl.arange(0, STEP)
            a = load_tile(a_ptr, k, m, row_stride, col, n, col_stride)
            acc = add_signed(signs(key, step, s_row), a, acc)
    store_tile(y_ptr + place * rows * n, acc * scale, row, rows, col, n)


@triton.jit(do_not_specialize=("row_begin", "first", "shift"))
def dense_sketch_adjoint_kernel(
    y_ptr, key_ptr, x_ptr, n: tl.int64, count: tl.int64, rows: tl.int64, cols: tl.int64, row_begin, first, shift, scale,
    GAUSSIAN: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x (cols, n), STEP columns of the operators a program; BLOCK_M rows of them at a time."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_n = tl.cdiv(n, BLOCK_N)
    at = pid // tiles_n
    col = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([STEP // 2 if GAUSSIAN else STEP, BLOCK_N], tl.float32)
    other = acc
    for i in range(0, count * tl.cdiv(rows, BLOCK_M)):
        k = i // tl.cdiv(rows, BLOCK_M)
        row = i % tl.cdiv(rows, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
        key = tl.load(key_ptr + k)
        y = load_tile(y_ptr + k * rows * n, row, rows, n, col, n, 1)
        s_row = (row + row_begin).to(tl.uint32)
        if GAUSSIAN:
            cosine, sine = normals(key, first + at, s_row, STEP)
            acc = add_normal(tl.trans(cosine), y, acc)
            other = add_normal(tl.trans(sine), y, other)
        else:
            acc = add_signed(tl.trans(signs(key, first + at, s_row)), y, acc)
    c = at * STEP - shift
    if GAUSSIAN:
        store_tile(x_ptr, acc * scale, c + normal_columns(STEP), cols, col, n)
        store_tile(x_ptr, other * scale, c + normal_columns(STEP) + 16, cols, col, n)
    else:
        store_tile(x_ptr, acc * scale, c + tl.arange(0, STEP), cols, col, n)


@triton.jit(do_not_specialize=("row_begin", "first", "shift"))
def dense_sketch_entries_kernel(
    key_ptr, out_ptr, rows: tl.int64, cols: tl.int64, row_begin, first, shift,
    GAUSSIAN: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (K, rows, cols), tiles (BLOCK_R, STEP)."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_r, tiles_c = tl.cdiv(rows, BLOCK_R), tl.cdiv(cols + shift, STEP)
    row = pid % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    at = pid // tiles_r % tiles_c
    k = pid // (tiles_r * tiles_c)
    key, s_row = tl.load(key_ptr + k), (row + row_begin).to(tl.uint32)
    out_ptr += k * rows * cols
    c = at * STEP - shift
    if GAUSSIAN:
        cosine, sine = normals(key, first + at, s_row, STEP)
        store_tile(out_ptr, cosine, row, rows, c + normal_columns(STEP), cols)
        store_tile(out_ptr, sine, row, rows, c + normal_columns(STEP) + 16, cols)
    else:
        store_tile(out_ptr, signs(key, first + at, s_row), row, rows, c + tl.arange(0, STEP), cols)


@launch.op(
    "dense_sketch(Tensor a, Tensor key, str family, SymInt d, SymInt row_begin, SymInt row_end, SymInt col_offset) -> Tensor"
)
def dense_sketch(a, key, family, d, row_begin, row_end, col_offset):
    launch.floating("dense_sketch", a=a)
    if a.dim() != 2:
        raise ValueError(f"dense_sketch: a must have shape (m, n), got {tuple(a.shape)}")
    step = 64 if family == "gaussian" else SIGNS.value  # as many normals as registers hold beside the product
    place = _place("dense_sketch", key, a.device, family, d, row_begin, row_end, col_offset, a.shape[0], step)
    (m, n), count, rows = a.shape, key.shape[0], row_end - row_begin
    y = a.new_empty((count, rows, n), dtype=torch.float32)
    if y.numel() == 0:
        return y
    down = a.stride(1) != 1 and a.stride(0) == 1
    a = a if down or a.stride(1) == 1 else a.contiguous()
    tile = _tile(place["GAUSSIAN"], a.dtype)
    tiles = count * triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    part, parts = parts_of(m, place["shift"], tiles, step)
    sums = y if parts == 1 else y.new_empty((parts, *y.shape))
    dense_sketch_kernel[(parts * tiles,)](
        a, key.contiguous(), sums, *a.stride(), m, n, count, rows, part, scale=d**-0.5, DOWN=down, **place, **tile
    )
    return y if parts == 1 else sums.sum(0)


@launch.op(
    "dense_sketch_adjoint(Tensor y, Tensor key, str family, SymInt d, SymInt row_begin, SymInt row_end, SymInt col_offset,"
    " SymInt cols) -> Tensor"
)
def dense_sketch_adjoint(y, key, family, d, row_begin, row_end, col_offset, cols):
    launch.floating("dense_sketch_adjoint", y=y)
    place = _place("dense_sketch_adjoint", key, y.device, family, d, row_begin, row_end, col_offset, cols)
    count, rows = key.shape[0], row_end - row_begin
    launch.sketched("dense_sketch_adjoint", y, key, rows)
    n = y.shape[2]
    x = y.new_empty((cols, n), dtype=torch.float32)
    if x.numel() != 0:
        tile = _adjoint_tile(place["GAUSSIAN"])
        tiles = triton.cdiv(cols + place["shift"], place["STEP"]) * triton.cdiv(n, tile["BLOCK_N"])
        dense_sketch_adjoint_kernel[(tiles,)](
            y.contiguous(), key.contiguous(), x, n, count, rows, cols, scale=d**-0.5, **place, **tile
        )
    return x


@launch.op(
    "dense_sketch_entries(Tensor key, str family, SymInt row_begin, SymInt row_end, SymInt col_offset, SymInt cols) -> Tensor"
)
def dense_sketch_entries(key, family, row_begin, row_end, col_offset, cols):
    if not 0 <= row_begin <= row_end <= 2**32:
        raise ValueError(
            f"dense_sketch_entries: rows must satisfy 0 <= row_begin <= row_end <= 2**32, got {row_begin} and {row_end}"
        )
    place = _place("dense_sketch_entries", key, key.device, family, 1, 0, 1, col_offset, cols)
    place["row_begin"] = row_begin
    rows = row_end - row_begin
    out = key.new_empty((key.shape[0], rows, cols), dtype=torch.float32)
    if out.numel() != 0:
        tiles = key.shape[0] * triton.cdiv(rows, 16) * triton.cdiv(cols + place["shift"], place["STEP"])
        dense_sketch_entries_kernel[(tiles,)](key.contiguous(), out, rows, cols, **place, BLOCK_R=16)
    return out


def parts_of(m, shift, tiles, step):
    """(columns of S in a part, a multiple of step; parts) where one part has `tiles` programs."""
    part = max(triton.cdiv(m, triton.cdiv(PARTS, tiles)), 2048)
    part = triton.cdiv(part, step) * step
    return part, triton.cdiv(max(m + shift, 1), part)


def _tile(gaussian, dtype):
    """Rows of S and columns of A in a program. Three parts of float32 and the draws of normals ask for small tiles."""
    if launch.INTERPRETED:  # small matrices shall cross tile borders
        return {"BLOCK_M": 16, "BLOCK_N": 16}
    return {"BLOCK_M": 128, "BLOCK_N": 64 if gaussian or dtype == torch.float32 else 128, "num_warps": 8}


def _adjoint_tile(gaussian):
    """Rows of S at a time, and columns of Y in a program."""
    if launch.INTERPRETED:
        return {"BLOCK_M": 16, "BLOCK_N": 16}
    return {"BLOCK_M": 32 if gaussian else 64, "BLOCK_N": 64, "num_warps": 4}


def _place(op, key, device, family, d, row_begin, row_end, col_offset, cols, step=SIGNS.value):
    """Kernel arguments of an operator's block, `step` columns at a time, checked as the binding does."""
    if family not in ("gaussian", "rademacher"):
        raise ValueError(f"{op}: family must be gaussian or rademacher, got '{family}'")
    launch.sketch(op, key, device, d, row_begin, row_end, col_offset, cols)
    return {
        "row_begin": row_begin,
        "first": col_offset // step,
        "shift": col_offset % step,
        "GAUSSIAN": family == "gaussian",
        "STEP": step,
    }
