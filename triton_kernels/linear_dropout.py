"""`linear_dropout`: residual + D(act(x Wᵀ + bias)) in the epilogue of one GEMM, and the elementwise `act_dropout` pair.

Bytes: the plain product's, plus one read of the residual and one write of z where the backward asks for it; eager PyTorch
adds a read and a write of the output for each of act, dropout (and a mask) and residual. The elementwise pair moves 2 to 3
tensors once.
"""

import torch
import triton
import triton.language as tl
from randfuse import _checks

from . import launch, philox
from .activations import ACTIVATIONS, act, times_derivative
from .elementwise import multiple, tile_of_program, tiling
from .gemm import narrow, product_dropout


@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def act_dropout_kernel(
    z_ptr, other_ptr, y_ptr, z_stride: tl.int64, other_stride: tl.int64, rows: tl.int64, cols: tl.int64,
    key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample,
    ACT: tl.constexpr, GRAD: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = other + D(act(z)), other a residual or None; with GRAD y = D(other) act'(z), other a gradient."""
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    cols, z_stride, other_stride = multiple(cols, UNIT), multiple(z_stride, UNIT), multiple(other_stride, UNIT)
    row, col, inside, block = tile_of_program(rows, cols, shift, BLOCK_R, BLOCK_C)
    key, i = philox.stream_rows(key_ptr, row, rows, rows_per_key, row_offset)
    keep = philox.keep_tile(key, i, block_offset + block, sample, philox.OUTPUT_DOMAIN, threshold, BLOCK_C)
    z = tl.load(z_ptr + row[:, None] * z_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if other_ptr is not None:
        other = tl.load(other_ptr + row[:, None] * other_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if GRAD:
        y = tl.where(keep, times_derivative(other * scale, z, ACT), 0.0)
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
    launch.linear("linear_dropout", x, weight, bias)
    _activation("linear_dropout", activation)
    rows, w = launch.unit_stride_matrix(x), launch.unit_stride_matrix(weight)
    N = w.shape[0]
    stream = launch.stream("linear_dropout", key, (rows.shape[0], N), p, p_tensor, row_offset, col_offset, like=x)
    y = x.new_empty((*x.shape[:-1], N))
    if residual is not None:
        launch.floating("linear_dropout", x=x, residual=residual)
        _checks.shape("linear_dropout", "residual", residual, tuple(y.shape), "(…, N)")
    z = x.new_empty(y.shape if save_preact else (0,))
    if y.numel() != 0:
        bias = None if bias is None else bias.contiguous()
        residual = None if residual is None else launch.unit_stride_matrix(residual)
        product_dropout(
            rows, w, True, bias, residual, y, z if save_preact else None, stream, philox.OUTPUT_DOMAIN, activation
        )
    return y, z


@launch.op(
    "act_dropout(Tensor z, Tensor? residual, str activation, Tensor key, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def act_dropout(z, residual, activation, key, p, p_tensor, row_offset, col_offset):
    launch.floating("act_dropout", z=z, residual=residual)
    if residual is not None:
        _checks.shape("act_dropout", "residual", residual, tuple(z.shape), "of z")
    return _elementwise("act_dropout", z, residual, activation, False, key, p, p_tensor, row_offset, col_offset)


@launch.op(
    "act_dropout_grad(Tensor grad, Tensor z, str activation, Tensor key, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def act_dropout_grad(grad, z, activation, key, p, p_tensor, row_offset, col_offset):
    launch.floating("act_dropout_grad", grad=grad, z=z)
    _checks.shape("act_dropout_grad", "z", z, tuple(grad.shape), "of grad")
    return _elementwise("act_dropout_grad", z, grad, activation, True, key, p, p_tensor, row_offset, col_offset)


def _elementwise(op, z, other, activation, grad, key, p, p_tensor, row_offset, col_offset):
    _activation(op, activation)
    flat = launch.unit_stride_matrix(z)
    stream = launch.stream(op, key, flat.shape, p, p_tensor, row_offset, col_offset, like=z)
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    if y.numel() != 0:
        o = None if other is None else launch.unit_stride_matrix(other)
        o_stride = 0 if o is None else o.stride(0)
        tiles, tile = tiling(*flat.shape, stream["shift"])
        act_dropout_kernel[tiles](
            flat, o, y, flat.stride(0), o_stride, *flat.shape, **stream,
            ACT=activation, GRAD=grad, UNIT=launch.unit(flat.shape[1], flat.stride(0), o_stride), **tile,
        )  # fmt: skip
    return y


def _activation(op, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got '{activation}'")
