"""Pieces shared by the matrix products, and the product with dropout in its epilogue.

Operands are row-major with unit column stride. All index arithmetic is 64-bit: sizes and strides are annotated so.
"""

import triton
import triton.language as tl

from . import launch, philox
from .activations import act
from .elementwise import multiple
from .tuning import grid, m_class, tuned

INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def tile_of_program(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile row, tile column): GROUP_M tile rows advance together, so that L2 serves both operands again."""
    pid = tl.program_id(0).to(tl.int64)
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = pid - group * GROUP_M * tiles_n
    return first + within % height, within // height


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32. The interpreter multiplies the bit patterns of bfloat16, hence widens first."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to `dtype`, half to even. The interpreter truncates to bfloat16, hence rounds in integers there."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def halves(tile):
    """Left and right half of the columns of a tile; free in the layouts of accumulators."""
    tile = tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1])
    return tl.split(tile)


@triton.jit
def store_dropped(
    acc, bias_ptr, residual_ptr, y_ptr, z_ptr, residual_stride, tile_m, M, N, key, i, first_col, threshold, scale,
    block, sample, DOMAIN: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Epilogue y = residual + D(act(z)), z = acc + bias, of a tile from matrix column `first_col`, block `block` on.

    It goes 32 columns at a time: the words of a whole 128x256 tile beside its accumulator do not fit into registers.
    """
    HALF: tl.constexpr = acc.shape[1] // 2
    if HALF > 16:
        left, right = halves(acc)
        store_dropped(
            left, bias_ptr, residual_ptr, y_ptr, z_ptr, residual_stride, tile_m, M, N, key, i, first_col, threshold, scale,
            block, sample, DOMAIN, ACT,
        )  # fmt: skip
        store_dropped(
            right, bias_ptr, residual_ptr, y_ptr, z_ptr, residual_stride, tile_m, M, N, key, i, first_col + HALF, threshold,
            scale, block + HALF // 8, sample, DOMAIN, ACT,
        )  # fmt: skip
    else:
        rows = tile_m * acc.shape[0] + tl.arange(0, acc.shape[0])
        cols = first_col + tl.arange(0, acc.shape[1])
        col_inside = (cols >= 0) & (cols < N)
        inside = (rows < M)[:, None] & col_inside[None, :]
        place = rows[:, None] * N + cols[None, :]
        z = acc
        if bias_ptr is not None:
            z += tl.load(bias_ptr + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
        if z_ptr is not None:
            tl.store(z_ptr + place, narrow(z, z_ptr.dtype.element_ty), mask=inside)
        keep = philox.keep_tile(key, i, block, sample, DOMAIN, threshold, acc.shape[1])
        y = tl.where(keep, act(z, ACT) * scale, 0.0)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask=inside).to(tl.float32)
        tl.store(y_ptr + place, narrow(y, y_ptr.dtype.element_ty), mask=inside)


@tuned
@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def product_dropout_kernel(
    a_ptr, b_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr, a_stride: tl.int64, b_stride: tl.int64, residual_stride: tl.int64,
    M: tl.int64, N: tl.int64, K: tl.int64, m_class,
    key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample,
    DOMAIN: tl.constexpr, ACT: tl.constexpr, B_ROWS_N: tl.constexpr, UNIT_N: tl.constexpr, UNIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = residual + D(act(z)) and, if asked for, z = a @ b + bias, both (M, N); a (M, K), b (K, N), stored (N, K) if B_ROWS_N."""
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    N, K, a_stride = multiple(N, UNIT_N), multiple(K, UNIT_K), multiple(a_stride, UNIT_K)
    b_stride = multiple(b_stride, UNIT_K if B_ROWS_N else UNIT_N)
    residual_stride = multiple(residual_stride, UNIT_N)
    tile_m, tile_n = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N + shift, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N - shift + tl.arange(0, BLOCK_N)
    row_inside, col_inside = (rows < M)[:, None], ((cols >= 0) & (cols < N))[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_mask, b_mask = row_inside & (k < K)[None, :], col_inside & (k < K)[:, None]
        a = tl.load(a_ptr + rows[:, None] * a_stride + k[None, :], mask=a_mask, other=0.0)
        b_place = cols[None, :] * b_stride + k[:, None] if B_ROWS_N else k[:, None] * b_stride + cols[None, :]
        b = tl.load(b_ptr + b_place, mask=b_mask, other=0.0)
        acc = dot(a, b, acc)
    key, i = philox.stream_rows(key_ptr, rows, M, rows_per_key, row_offset)
    block = block_offset + tile_n * (BLOCK_N // 8)
    store_dropped(
        acc, bias_ptr, residual_ptr, y_ptr, z_ptr, residual_stride, tile_m, M, N, key, i, tile_n * BLOCK_N - shift,
        threshold, scale, block, sample, DOMAIN, ACT,
    )  # fmt: skip


def product_dropout(a, b, b_rows_n, bias, residual, y, z, stream, domain, activation):
    """Launch the kernel above on row-major matrices; b is (N, K) if b_rows_n, else (K, N)."""
    (M, K), N = a.shape, b.shape[0 if b_rows_n else 1]
    strides = a.stride(0), b.stride(0), 0 if residual is None else residual.stride(0)
    unit_n, unit_k = [N, strides[2]], [K, strides[0]]
    (unit_k if b_rows_n else unit_n).append(strides[1])
    product_dropout_kernel[grid(M, N + stream["shift"])](
        a, b, bias, residual, y, z, *strides, M, N, K, m_class(M), **stream, DOMAIN=domain, ACT=activation,
        B_ROWS_N=b_rows_n, UNIT_N=launch.unit(*unit_n), UNIT_K=launch.unit(*unit_k),
    )  # fmt: skip
