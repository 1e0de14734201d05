"""`dropout` and `dropout_mask`: memory-bound, one read and one write an element (4 bytes of bf16; a mask writes 1).

A thread owns blocks of eight neighbouring columns: one Philox call (about 60 integer instructions) decides about one
16-byte load of bf16, which leaves the kernel bound by memory.
"""

import torch
import triton
import triton.language as tl
from randfuse.reference import streams

from . import launch, philox
from .elementwise import multiple, tile_of_program, tiling
from .gemm import narrow


@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def dropout_kernel(
    x_ptr, y_ptr, x_stride: tl.int64, rows: tl.int64, cols: tl.int64,
    key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample, domain,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = x * scale where kept, else 0; the mask itself where x_ptr is None."""
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    cols, x_stride = multiple(cols, UNIT), multiple(x_stride, UNIT)
    row, col, inside, block = tile_of_program(rows, cols, shift, BLOCK_R, BLOCK_C)
    key, i = philox.stream_rows(key_ptr, row, rows, rows_per_key, row_offset)
    keep = philox.keep_tile(key, i, block_offset + block, sample, domain, threshold, BLOCK_C)  # (BLOCK_R, BLOCK_C)
    y = y_ptr + row[:, None] * cols + col[None, :]
    if x_ptr is None:
        tl.store(y, keep, mask=inside)
    else:
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside).to(tl.float32)
        # Select, never multiply: a dropped NaN or inf is 0.
        tl.store(y, narrow(tl.where(keep, x * scale, 0.0), y_ptr.dtype.element_ty), mask=inside)


@launch.op(
    "dropout(Tensor x, Tensor key, float p, Tensor? p_tensor, int op, SymInt sample, SymInt row_offset, SymInt col_offset)"
    " -> Tensor"
)
def dropout(x, key, p, p_tensor, op, sample, row_offset, col_offset):
    launch.floating("dropout", x=x)
    _op_id("dropout", op)
    flat = launch.unit_stride_matrix(x)
    stream = launch.stream("dropout", key, flat.shape, p, p_tensor, row_offset, col_offset, sample, like=x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _run(flat, flat.stride(0), y, *flat.shape, op, stream)


@launch.op(
    "dropout_mask(Tensor key, SymInt[] shape, float p, Tensor? p_tensor, int op, SymInt sample, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def dropout_mask(key, shape, p, p_tensor, op, sample, row_offset, col_offset):
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"dropout_mask: shape must be two sizes (rows, cols), got {list(shape)}")
    _op_id("dropout_mask", op)
    stream = launch.stream("dropout_mask", key, shape, p, p_tensor, row_offset, col_offset, sample)
    mask = torch.empty(shape, dtype=torch.bool, device=key.device)
    return _run(None, 0, mask, *shape, op, stream)


def _op_id(name, op):
    if not 0 <= op < 2**16:
        raise ValueError(f"{name}: op must be in [0, 2**16), got {op}")


def _run(x, x_stride, y, rows, cols, op, stream):
    if y.numel() != 0:
        grid, tile = tiling(rows, cols, stream["shift"])
        dropout_kernel[grid](
            x, y, x_stride, rows, cols, **stream, domain=streams.domain_word(op, 16), UNIT=launch.unit(cols, x_stride), **tile
        )  # fmt: skip
    return y
