"""`dropout_linear` and the two products of its derivatives, each one GEMM that regenerates the mask where it needs it.

    y = scale * (x masked) Wᵀ + bias      mask in the prologue: once for each tile of x that is read
    dgrad = mask * scale * (g W)          mask in the epilogue: once for each element
    wgrad = scale * gᵀ (x masked)         mask in the prologue

Bytes: those of the plain product, no mask and no dropped copy of x. Work: 2 M N K flops on tensor cores, and M K ceil(N/BLOCK_N)
decisions at about 8 integer instructions each, 8/(2·BLOCK_N) instructions a flop. The scale is applied once, to the fp32
accumulator. One program owns one tile of the result, or a part of its
sum, in a fixed order: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from randfuse import _checks

from . import launch, philox
from .elementwise import multiple
from .gemm import dot, narrow, product_dropout, tile_of_program
from .tuning import grid, m_class, tuned

PROGRAMS = 256  # of wgrad, about two a multiprocessor
MIN_PART = 256  # rows worth a program's start


@triton.jit
def dropped_product(
    x_ptr, w_ptr, x_stride, w_stride, N, K, x_rows, row_inside, cols, key, i, sample, block_offset, shift, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """D(x) w without its scale, of rows `x_rows` of x and rows `cols` of w: (BLOCK_M, BLOCK_N), fp32."""
    col_inside = (cols < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K + shift, BLOCK_K):
        k = start - shift + tl.arange(0, BLOCK_K)
        k_inside = (k >= 0) & (k < K)
        x_mask, w_mask = row_inside[:, None] & k_inside[None, :], col_inside & k_inside[:, None]
        x = tl.load(x_ptr + x_rows[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptr + cols[None, :] * w_stride + k[:, None], mask=w_mask, other=0.0)  # (BLOCK_K, BLOCK_N)
        block = block_offset + start // 8
        keep = philox.keep_tile(key, i, block, sample, philox.INPUT_DOMAIN, threshold, BLOCK_K)
        acc = dot(tl.where(keep, x, 0.0), w, acc)
    return acc


@tuned
@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def dropout_linear_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, x_stride: tl.int64, w_stride: tl.int64, M: tl.int64, N: tl.int64, K: tl.int64, m_class,
    samples, key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample,
    UNIT_N: tl.constexpr, UNIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """x (M, K), w (N, K), bias (N,) or None -> y (M, N); with samples, x has M / samples rows (see sample_rows)."""
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    N, K, x_stride, w_stride = (
        multiple(N, UNIT_N),
        multiple(K, UNIT_K),
        multiple(x_stride, UNIT_K),
        multiple(w_stride, UNIT_K),
    )
    tile_m, tile_n = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offsets = tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = tile_m * BLOCK_M + offsets < M
    x_rows, height, sample, places = philox.sample_rows(tile_m * BLOCK_M, offsets, M, samples, sample)
    key, i = philox.stream_rows(key_ptr, x_rows, height, rows_per_key, row_offset)
    acc = dropped_product(
        x_ptr, w_ptr, x_stride, w_stride, N, K, x_rows, row_inside, cols, key, i, sample, block_offset, shift, threshold,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    y = acc * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y = narrow(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + places[:, None] * N + cols[None, :], y, mask=row_inside[:, None] & (cols < N)[None, :])


@tuned
@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def dropout_linear_wgrad_kernel(
    g_ptr, x_ptr, y_ptr, g_stride: tl.int64, x_stride: tl.int64, M: tl.int64, N: tl.int64, K: tl.int64, m_class,
    samples, part: tl.int64, key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample,
    UNIT_N: tl.constexpr, UNIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """g (M, N), x (M, K) -> y (parts, N, K), each the sum of `part` rows. y is tiled (BLOCK_M, BLOCK_N), rows by BLOCK_K.

    With samples, x has M / samples rows; g is (samples, M / samples, N).
    """
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    N, K, g_stride, x_stride = (
        multiple(N, UNIT_N),
        multiple(K, UNIT_K),
        multiple(g_stride, UNIT_N),
        multiple(x_stride, UNIT_K),
    )
    tile_n, tile_k = tile_of_program(tl.cdiv(N, BLOCK_M), tl.cdiv(K + shift, BLOCK_N), GROUP_M)
    n = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k * BLOCK_N - shift + tl.arange(0, BLOCK_N)
    n_inside, k_inside = n < N, (k >= 0) & (k < K)
    block = block_offset + tile_k * (BLOCK_N // 8)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, M)
    for start in range(first, last, BLOCK_K):
        offsets = tl.arange(0, BLOCK_K)
        row_inside = (start + offsets < last)[:, None]
        x_rows, height, sub_stream, places = philox.sample_rows(start, offsets, M, samples, sample)
        g_mask, x_mask = n_inside[None, :] & row_inside, k_inside[None, :] & row_inside
        g = tl.load(g_ptr + places[:, None] * g_stride + n[None, :], mask=g_mask, other=0.0)  # (BLOCK_K, BLOCK_M)
        x = tl.load(x_ptr + x_rows[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)  # (BLOCK_K, BLOCK_N)
        key, i = philox.stream_rows(key_ptr, x_rows, height, rows_per_key, row_offset)
        keep = philox.keep_tile(key, i, block, sub_stream, philox.INPUT_DOMAIN, threshold, BLOCK_N)
        acc = dot(tl.trans(g), tl.where(keep, x, 0.0), acc)
    y = narrow(acc * scale, y_ptr.dtype.element_ty)
    place = (tl.program_id(1) * N + n)[:, None] * K + k[None, :]
    tl.store(y_ptr + place, y, mask=n_inside[:, None] & k_inside[None, :])


def product(x, w, bias, y, samples, stream):
    """Launch the first kernel on matrices; y has `samples` rows (None: one) for each of x."""
    (M, K), N = x.shape, w.shape[0]
    height = M * (samples or 1)
    dropout_linear_kernel[grid(height, N)](
        x, w, None if bias is None else bias.contiguous(), y, x.stride(0), w.stride(0), height, N, K, m_class(height),
        samples, **stream, UNIT_N=launch.unit(N), UNIT_K=launch.unit(K, x.stride(0), w.stride(0)),
    )  # fmt: skip


def product_wgrad(g, x, samples, stream, dtype):
    """The second one: (N, K) in `dtype` from g with `samples` rows (None: one) for each of x.

    A narrow result has few tiles: the rows are cut into parts then, which torch sums.
    """
    (M, N), K = g.shape, x.shape[1]
    parts = max(1, min(PROGRAMS // (triton.cdiv(N, 64) * triton.cdiv(K, 64)), M // MIN_PART))
    part = triton.cdiv(triton.cdiv(M, parts), 64) * 64
    parts = triton.cdiv(M, part)
    y = g.new_empty((parts, N, K), dtype=dtype if parts == 1 else torch.float32)
    tiles = grid(N, K + stream["shift"])
    dropout_linear_wgrad_kernel[lambda meta: (*tiles(meta), parts)](
        g, x, y, g.stride(0), x.stride(0), M, N, K, m_class(M), samples, part, **stream,
        UNIT_N=launch.unit(N, g.stride(0)), UNIT_K=launch.unit(K, x.stride(0)),
    )  # fmt: skip
    return y[0] if parts == 1 else y.sum(0).to(dtype)


@launch.op(
    "dropout_linear(Tensor x, Tensor weight, Tensor? bias, Tensor key, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def dropout_linear(x, weight, bias, key, p, p_tensor, row_offset, col_offset):
    launch.linear("dropout_linear", x, weight, bias)
    (N, K), (rows, w) = weight.shape, (launch.unit_stride_matrix(x), launch.unit_stride_matrix(weight))
    M = rows.shape[0]
    stream = launch.stream("dropout_linear", key, (M, K), p, p_tensor, row_offset, col_offset, like=x)
    y = x.new_empty((*x.shape[:-1], N))
    if y.numel() != 0:
        product(rows, w, bias, y, None, stream)
    return y


@launch.op(
    "dropout_linear_dgrad(Tensor grad, Tensor weight, Tensor key, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def dropout_linear_dgrad(grad, weight, key, p, p_tensor, row_offset, col_offset):
    launch.floating("dropout_linear_dgrad", grad=grad, weight=weight)
    launch.at_least_one_dimension("dropout_linear_dgrad", grad=grad)
    if weight.dim() != 2 or weight.shape[0] != grad.shape[-1]:
        inner = grad.shape[-1]
        raise ValueError(f"dropout_linear_dgrad: weight must have shape (N={inner}, K), got {tuple(weight.shape)}")
    g, w = launch.unit_stride_matrix(grad), launch.unit_stride_matrix(weight)
    K = w.shape[1]
    stream = launch.stream("dropout_linear_dgrad", key, (g.shape[0], K), p, p_tensor, row_offset, col_offset, like=grad)
    y = grad.new_empty((*grad.shape[:-1], K))
    if y.numel() != 0:
        product_dropout(g, w, False, None, None, y, None, stream, philox.INPUT_DOMAIN, "none")
    return y


@launch.op(
    "dropout_linear_wgrad(Tensor grad, Tensor x, Tensor key, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def dropout_linear_wgrad(grad, x, key, p, p_tensor, row_offset, col_offset):
    launch.floating("dropout_linear_wgrad", grad=grad, x=x)
    launch.at_least_one_dimension("dropout_linear_wgrad", grad=grad, x=x)
    _checks.shape("dropout_linear_wgrad", "x", x, (*grad.shape[:-1], x.shape[-1]), "(…, K)")
    g, rows = launch.unit_stride_matrix(grad), launch.unit_stride_matrix(x)
    (M, N), K = g.shape, rows.shape[1]
    stream = launch.stream("dropout_linear_wgrad", key, (M, K), p, p_tensor, row_offset, col_offset, like=grad)
    return product_wgrad(g, rows, None, stream, grad.dtype) if M * N * K else grad.new_zeros((N, K))
