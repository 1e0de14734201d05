"""`mixout`: a + D(w - a) in one pass, two reads and one write (6 bytes a bf16 weight), and `mixout_linear` upon it.

The product is the library's: see `dropconnect_linear`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from randfuse import _checks

from . import launch, philox
from .elementwise import multiple, tile_of_program, tiling
from .gemm import narrow


@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def mixout_kernel(
    w_ptr, a_ptr, y_ptr, w_stride: tl.int64, a_stride: tl.int64, rows: tl.int64, cols: tl.int64,
    key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = a + D(w - a), and w itself where p is 0."""
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    cols, w_stride, a_stride = multiple(cols, UNIT), multiple(w_stride, UNIT), multiple(a_stride, UNIT)
    row, col, inside, block = tile_of_program(rows, cols, shift, BLOCK_R, BLOCK_C)
    key, i = philox.stream_rows(key_ptr, row, rows, rows_per_key, row_offset)
    keep = philox.keep_tile(key, i, block_offset + block, sample, philox.WEIGHT_DOMAIN, threshold, BLOCK_C)
    w = tl.load(w_ptr + row[:, None] * w_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row[:, None] * a_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    mixed = a + tl.where(keep, (w - a) * scale, 0.0)
    y = narrow(tl.where(threshold == 0, w, mixed), y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * cols + col[None, :], y, mask=inside)


@launch.op(
    "mixout(Tensor weight, Tensor anchor, Tensor key, float p, Tensor? p_tensor, SymInt row_offset, SymInt col_offset)"
    " -> Tensor"
)
def mixout(weight, anchor, key, p, p_tensor, row_offset, col_offset):
    return _mixed("mixout", weight, anchor, key, p, p_tensor, row_offset, col_offset)


@launch.op(
    "mixout_linear(Tensor x, Tensor weight, Tensor anchor, Tensor? bias, Tensor key, float p, Tensor? p_tensor,"
    " SymInt row_offset, SymInt col_offset) -> Tensor"
)
def mixout_linear(x, weight, anchor, bias, key, p, p_tensor, row_offset, col_offset):
    mixed = _mixed("mixout_linear", weight, anchor, key, p, p_tensor, row_offset, col_offset)
    mixed = mixed.to(x.dtype)  # under autocast the weights are wider than x, and rounded once
    launch.linear("mixout_linear", x, mixed, bias)
    return F.linear(x, mixed, bias).contiguous()


def _mixed(op, weight, anchor, key, p, p_tensor, row_offset, col_offset):
    launch.floating(op, weight=weight, anchor=anchor)
    _checks.shape(op, "anchor", anchor, tuple(weight.shape), "of weight")
    w, a = launch.unit_stride_matrix(weight), launch.unit_stride_matrix(anchor)
    stream = launch.stream(op, key, w.shape, p, p_tensor, row_offset, col_offset, like=weight)
    y = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if y.numel() != 0:
        grid, tile = tiling(*w.shape, stream["shift"])
        mixout_kernel[grid](
            w, a, y, w.stride(0), a.stride(0), *w.shape, **stream,
            UNIT=launch.unit(w.shape[1], w.stride(0), a.stride(0)), **tile,
        )  # fmt: skip
    return y
