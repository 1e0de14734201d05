"""`multi_sample_scale`: x times the mean of M masks, one read and one write an element (4 bytes of bf16).

A Philox call of ten rounds decides about four elements; the count is M comparisons with thresholds that every thread reads
from the cache. The thresholds are integers of (p, M), made once and kept on the device.
"""

import functools

import torch
import triton
import triton.language as tl
from randfuse.reference import streams

from . import launch, philox
from .elementwise import multiple, tile_of_program, tiling
from .gemm import narrow

DOMAIN = tl.constexpr(streams.domain_word(streams.MULTI_SAMPLE_COUNT, 32))
MOST_SAMPLES = 128


@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def multi_sample_scale_kernel(
    x_ptr, y_ptr, x_stride: tl.int64, rows: tl.int64, cols: tl.int64, thresholds_ptr, mean_scale_ptr, samples,
    key_ptr, rows_per_key, row_offset, block_offset, shift,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols, x_stride = multiple(cols, UNIT), multiple(x_stride, UNIT)
    row, col, inside, block = tile_of_program(rows, cols, shift, BLOCK_R, BLOCK_C)
    key, i = philox.stream_rows(key_ptr, row, rows, rows_per_key, row_offset)
    # 32-bit lanes: four columns a block, two blocks where masks have one.
    j = (2 * (block_offset + block)).to(tl.uint32) + tl.arange(0, BLOCK_C // 4).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(key, j[None, :], i[:, None], 0, DOMAIN, philox.WORD_ROUNDS)
    lane = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [BLOCK_R, BLOCK_C]).to(tl.int64)
    count = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for k in range(0, samples):
        count += (lane >= tl.load(thresholds_ptr + k)).to(tl.int32)
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside).to(tl.float32)
    y = tl.where(count > 0, x * (count.to(tl.float32) * tl.load(mean_scale_ptr)), 0.0)
    tl.store(y_ptr + row[:, None] * cols + col[None, :], narrow(y, y_ptr.dtype.element_ty), mask=inside)


def _table(threshold, samples, device):
    thresholds = streams.count_thresholds(threshold, samples)
    scale = torch.as_tensor(streams.count_scale(thresholds)).to(device, torch.float32)
    return torch.as_tensor(thresholds, device=device), scale


_kept_table = functools.lru_cache(_table)


@launch.op(
    "multi_sample_scale(Tensor x, Tensor key, int num_samples, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def multi_sample_scale(x, key, num_samples, p, p_tensor, row_offset, col_offset):
    op = "multi_sample_scale"
    launch.floating(op, x=x)
    if not 1 <= num_samples <= MOST_SAMPLES:
        raise ValueError(f"{op}: num_samples must be in [1, {MOST_SAMPLES}], got {num_samples}")
    flat = launch.unit_stride_matrix(x)
    rows, cols = flat.shape
    if col_offset > 2**34 - cols:
        raise ValueError(f"{op}: col_offset must be in [0, 2**34 - cols], got {col_offset}")
    stream = launch.stream(op, key, (rows, cols), p, p_tensor, row_offset, col_offset, like=x)
    if stream["p_ptr"] is None:
        thresholds, scale = _kept_table(stream["threshold"], num_samples, x.device)
    else:
        thresholds, scale = _table(streams.threshold(stream["p_ptr"]), num_samples, x.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() != 0:
        place = {name: stream[name] for name in ("key_ptr", "rows_per_key", "row_offset", "block_offset", "shift")}
        tiles, blocks = tiling(rows, cols, place["shift"])
        multi_sample_scale_kernel[tiles](
            flat, y, flat.stride(0), rows, cols, thresholds, scale, num_samples, **place,
            UNIT=launch.unit(cols, flat.stride(0)), **blocks,
        )  # fmt: skip
    return y
