"""`linear_dropout`: residual + D(act(x Wᵀ + bias)) in the epilogue of one GEMM, and the elementwise `act_dropout` pair.

Bytes: the plain product's, plus one read of the residual and one write of z where the backward asks for it; eager PyTorch
adds a read and a write of the output for each of act, dropout (and a mask) and residual. The elementwise pair moves 2 to 3
tensors once.
"""

import torch
import triton
import triton.language as tl

from . import launch, philox
from .elementwise import tile_of_program as elementwise_tile
from .elementwise import tiling
from .gemm import grid, m_class, narrow, product, tile_of_program, tuned

ACTIVATIONS = ("none", "relu", "gelu", "silu")


@triton.jit
def act(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)  # NaN stays NaN, as in F.relu
    elif ACT == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.5**0.5))
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def act_derivative(z, ACT: tl.constexpr):
    if ACT == "relu":
        d = tl.where(z > 0, 1.0, 0.0)
    elif ACT == "gelu":
        d = 0.5 * (1 + tl.erf(z * 0.5**0.5)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327  # 1/sqrt(2 pi)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        d = s * (1 + z * (1 - s))
    else:
        d = tl.full(z.shape, 1.0, tl.float32)
    return d


@tuned(lambda a: a["K"] % a["BLOCK_K"] == 0)
@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def linear_dropout_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr, x_stride: tl.int64, w_stride: tl.int64, residual_stride: tl.int64,
    M: tl.int64, N: tl.int64, K: tl.int64, m_class,
    key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x (M, K), w (N, K), bias (N,) or None, residual (M, N) or None -> y (M, N) and, if z_ptr, z = x wᵀ + bias."""
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    tile_m, tile_n = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N + shift, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N - shift + tl.arange(0, BLOCK_N)
    col_inside = (cols >= 0) & (cols < N)
    inside = (rows < M)[:, None] & col_inside[None, :]
    place = rows[:, None] * N + cols[None, :]  # of y and z
    z = product(x_ptr, w_ptr, x_stride, 1, w_stride, rows, cols, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + place, narrow(z, z_ptr.dtype.element_ty), mask=inside)
    key, i = philox.stream_rows(key_ptr, rows, M, rows_per_key, row_offset)
    block = block_offset + tile_n * (BLOCK_N // 8)
    keep = philox.keep_tile(key, i, block, sample, philox.OUTPUT_DOMAIN, threshold, BLOCK_N)  # (BLOCK_M, BLOCK_N)
    y = tl.where(keep, act(z, ACT) * scale, 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask=inside).to(tl.float32)
    tl.store(y_ptr + place, narrow(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def act_dropout_kernel(
    z_ptr, other_ptr, y_ptr, z_stride: tl.int64, other_stride: tl.int64, rows: tl.int64, cols: tl.int64,
    key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample,
    ACT: tl.constexpr, GRAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = other + D(act(z)), other a residual or None; with GRAD y = D(other) act'(z), other a gradient."""
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    row, col, inside, block = elementwise_tile(rows, cols, shift, BLOCK_R, BLOCK_C)
    key, i = philox.stream_rows(key_ptr, row, rows, rows_per_key, row_offset)
    keep = philox.keep_tile(key, i, block_offset + block, sample, philox.OUTPUT_DOMAIN, threshold, BLOCK_C)
    z = tl.load(z_ptr + row[:, None] * z_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if other_ptr is not None:
        other = tl.load(other_ptr + row[:, None] * other_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if GRAD:
        y = tl.where(keep, other * scale * act_derivative(z, ACT), 0.0)
    else:
        y = tl.where(keep, act(z, ACT) * scale, 0.0)
        if other_ptr is not None:
            y += other
    tl.store(y_ptr + row[:, None] * cols + col[None, :], narrow(y, y_ptr.dtype.element_ty), mask=inside)


@launch.op(
    "linear_dropout(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool save_preact, Tensor key,"
    " float p, Tensor? p_tensor, SymInt row_offset, SymInt col_offset) -> (Tensor, Tensor)"
)
def linear_dropout(x, weight, bias, residual, activation, save_preact, key, p, p_tensor, row_offset, col_offset):
    launch.floating("linear_dropout", x=x, weight=weight, bias=bias, residual=residual)
    _activation("linear_dropout", activation)
    (N, K), (rows, w) = weight.shape, (launch.matrix(x), launch.matrix(weight))
    M = rows.shape[0]
    stream = launch.stream("linear_dropout", key, (M, N), p, p_tensor, row_offset, col_offset, like=x)
    y = x.new_empty((*x.shape[:-1], N))
    z = x.new_empty(y.shape if save_preact else (0,))
    if y.numel() != 0:
        bias = None if bias is None else bias.contiguous()
        r = None if residual is None else launch.matrix(residual)
        linear_dropout_kernel[grid(M, N + stream["shift"])](
            rows, w, bias, r, y, z if save_preact else None, rows.stride(0), w.stride(0), 0 if r is None else r.stride(0),
            M, N, K, m_class(M), **stream, ACT=activation,
        )  # fmt: skip
    return y, z


@launch.op(
    "act_dropout(Tensor z, Tensor? residual, str activation, Tensor key, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def act_dropout(z, residual, activation, key, p, p_tensor, row_offset, col_offset):
    launch.floating("act_dropout", z=z, residual=residual)
    return _elementwise("act_dropout", z, residual, activation, False, key, p, p_tensor, row_offset, col_offset)


@launch.op(
    "act_dropout_grad(Tensor grad, Tensor z, str activation, Tensor key, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def act_dropout_grad(grad, z, activation, key, p, p_tensor, row_offset, col_offset):
    launch.floating("act_dropout_grad", grad=grad, z=z)
    return _elementwise("act_dropout_grad", z, grad, activation, True, key, p, p_tensor, row_offset, col_offset)


def _elementwise(op, z, other, activation, grad, key, p, p_tensor, row_offset, col_offset):
    _activation(op, activation)
    flat = launch.matrix(z)
    stream = launch.stream(op, key, flat.shape, p, p_tensor, row_offset, col_offset, like=z)
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    if y.numel() != 0:
        o = None if other is None else launch.matrix(other)
        tiles, tile = tiling(*flat.shape, stream["shift"])
        act_dropout_kernel[tiles](
            flat, o, y, flat.stride(0), 0 if o is None else o.stride(0), *flat.shape, **stream,
            ACT=activation, GRAD=grad, **tile,
        )  # fmt: skip
    return y


def _activation(op, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
