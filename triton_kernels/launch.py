"""What every launcher does on the host: registration, checks, the matrix view and the stream's arguments."""

import functools
import math

import torch
import triton
from randfuse import _checks
from randfuse.reference import streams
from torch import Tensor

NAMESPACE = "randfuse_triton"
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when this was imported: kernels run on the CPU
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Arguments that change from call to call and must not compile a new kernel; they address nothing.
UNSPECIALIZED = ("threshold", "sample", "domain", "row_offset", "block_offset", "m_class")

library = torch.library.Library(NAMESPACE, "DEF")


def op(schema):
    """Register the launcher below as `randfuse_triton::<schema>`; the text is that of the C++ op."""

    def register(launcher):
        @functools.wraps(launcher)
        def guarded(first, *args):
            with torch.cuda.device_of(first):
                return launcher(first, *args)

        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for backend in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            library.impl(launcher.__name__, guarded, backend)
        return guarded

    return register


def floating(op_name, **tensors):
    """Operands (None is allowed) of one dtype that the kernels know, on one device."""
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _checks.float_tensor(op_name, name, tensor, like=first)
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op_name}: {name} must be float32, float16 or bfloat16 in Triton, got {tensor.dtype}")


def at_least_one_dimension(op_name, **tensors):
    for name, tensor in tensors.items():
        if tensor.dim() == 0:
            raise ValueError(f"{op_name}: {name} must have at least one dimension, got 0")


def linear(op_name, x, weight, bias=None):
    """x (…, K), weight (N, K), bias (N,) or None."""
    floating(op_name, x=x, weight=weight, bias=bias)
    at_least_one_dimension(op_name, x=x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op_name}: weight must have shape (N, K={x.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None:
        _checks.shape(op_name, "bias", bias, (weight.shape[0],), "(N,)")


def sketch(op_name, key, device, d, row_begin, row_end, col_offset, cols):
    """key (K,) of K operators, of which rows [row_begin, row_end) of d and `cols` columns from col_offset on are meant."""
    if key.dtype != torch.int64:
        raise TypeError(f"{op_name}: key must be int64, got {key.dtype}")
    if key.dim() != 1 or key.numel() == 0:
        raise ValueError(f"{op_name}: key must have shape (K,) with K > 0, got {tuple(key.shape)}")
    if key.device != device:
        raise ValueError(f"{op_name}: key must be on {device}, got {key.device}")
    if not 1 <= d < 2**31:
        raise ValueError(f"{op_name}: d must be in [1, 2**31), got {d}")
    if not 0 <= row_begin <= row_end <= d:
        raise ValueError(
            f"{op_name}: rows must satisfy 0 <= row_begin <= row_end <= d={d}, got {row_begin} and {row_end}"
        )
    if not 0 <= col_offset <= 2**62 - cols or cols < 0:
        raise ValueError(f"{op_name}: col_offset must be in [0, 2**62 - {cols}], got {col_offset}")


def sketched(op_name, y, key, rows):
    """y (K, rows, n) of the operators' block."""
    if y.dim() != 3 or tuple(y.shape[:2]) != (key.shape[0], rows):
        raise ValueError(
            f"{op_name}: y must have shape (K, rows, n) = ({key.shape[0]}, {rows}, n), got {tuple(y.shape)}"
        )


def parameter(op, name, value, rows, device):
    """A parameter () or (rows,) where kernels can read it; one value is filled in, not copied."""
    if value is None:
        return None
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != rows):
        raise ValueError(f"{op}: {name} must have shape () or (rows,) = ({rows},), got {tuple(value.shape)}")
    dtype = torch.float64 if value.is_floating_point() else torch.int64
    if value.dim() == 0 and value.device != device:
        return torch.full((), value.item(), dtype=dtype, device=device)
    return value.to(device, dtype).contiguous()


def unit_stride_matrix(x: Tensor) -> Tensor:
    """x as (rows, last dim) with unit stride along columns; any row stride will do, 0 included.

    A column stride would cost every kernel its vectorised loads, so the rare tensor that has one is copied.
    """
    flat = x.reshape(_checks.rows_cols(x.shape))
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()


def unit(*sizes):
    """Largest power of two up to 16 that divides all sizes; Triton's own specialisation tells 16 from everything else,
    and would read a row of 1000 bf16 element by element."""
    return math.gcd(16, *sizes)


def stream(op_name, key, shape, p, p_tensor, row_offset, col_offset, sample=0, like=None):
    """Kernel arguments of the mask of a (rows, cols) matrix. p is read by the kernel where it lies on the device."""
    rows, cols = shape
    device = key.device if like is None else like.device
    _checks.key_tensor(op_name, key, rows, device)
    _checks.stream_range(op_name, rows, cols, row_offset, col_offset, sample)
    on_device = p_tensor is not None and p_tensor.device == device  # the CPU too, for the interpreter
    _checks.probability(op_name, p if p_tensor is None else p_tensor, device, read=not on_device)
    threshold = 0 if on_device else int(streams.threshold(p if p_tensor is None else p_tensor))
    return {
        "key_ptr": key.contiguous(),
        "p_ptr": p_tensor if on_device else None,
        "threshold": threshold,
        "scale": streams.scale(threshold),
        "rows_per_key": None if key.numel() == 1 else rows // key.numel(),
        "row_offset": row_offset,
        "block_offset": col_offset // 8,
        "shift": col_offset % 8,
        "sample": sample - 2**32 if sample >= 2**31 else sample,  # the same 32 bits, as one type of argument
    }
