"""Argument checks shared by the public functions. Every message reads `<op>: <argument> must …, got …`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def rows_cols(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """A tensor seen as (rows, last dim): leading dims are flattened into rows."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def matrix(x: Tensor) -> Tensor:
    """x as (rows, last dim), also when it is empty."""
    return x.reshape(rows_cols(x.shape))


def float_tensor(op: str, name: str, x: object, *, like: Tensor | None = None, dtype: bool = True) -> None:
    """`x` is a floating tensor; with `like`, on its device and (unless `dtype=False`) of its dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dtype == torch.float64 and x.device.type not in ("cpu", "meta"):
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16 on {x.device.type}, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {x.device}")
    if like is not None and dtype and x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype}, got {x.dtype}")


def shape(op: str, name: str, x: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """`x` has the shape that `letters` names, for example `(N, K)`."""
    if tuple(x.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {letters} = {expected}, got {tuple(x.shape)}")


def probability(op: str, p: object, device: torch.device, *, read: bool = True) -> None:
    """`p` is a number in [0, 1] or a 0-d floating tensor, whose value is read where that costs no sync, if at all."""
    if isinstance(p, Tensor):
        if p.dim() != 0 or not p.is_floating_point():
            raise ValueError(f"{op}: p must be a number or a 0-d floating tensor, got {tuple(p.shape)} {p.dtype}")
        if p.device.type != "cpu" and p.device != device:
            where = "the CPU" if device.type == "cpu" else f"{device} or the CPU"
            raise ValueError(f"{op}: p must be on {where}, got {p.device}")
        traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(p)
        if p.device.type != "cpu" or traced or not read:  # the kernel checks or clamps it
            return
        p = p.item()
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{op}: p must be a number or a 0-d floating tensor, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:  # also refuses NaN
        raise ValueError(f"{op}: p must be in [0, 1], got {p}")


def key_tensor(op: str, key: object, rows: int, device: torch.device) -> None:
    """`key` is an int64 tensor () or (G,) on `device`, G dividing the rows."""
    if not isinstance(key, Tensor):
        raise TypeError(f"{op}: key must be an int64 Tensor (see randfuse.key), got {type(key).__name__}")
    if key.dtype != torch.int64:
        raise TypeError(f"{op}: key must be int64, got {key.dtype}")
    if key.dim() > 1:
        raise ValueError(f"{op}: key must have shape () or (G,), got {tuple(key.shape)}")
    if key.device != device:
        raise ValueError(f"{op}: key must be on {device}, got {key.device}")
    if key.dim() == 1 and (key.shape[0] == 0 or rows % key.shape[0] != 0):
        raise ValueError(f"{op}: key must have a length that divides the {rows} rows, got {key.shape[0]}")


def stream_range(op: str, rows: int, cols: int, row_offset: int, col_offset: int, sample: int = 0) -> None:
    """The coordinates fit the counter words: rows and samples below 2**32, columns below 2**35."""
    for name, value in (("row_offset", row_offset), ("col_offset", col_offset), ("sample", sample)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not 0 <= row_offset <= 2**32 - rows:
        raise ValueError(f"{op}: row_offset must be in [0, 2**32 - rows], got {row_offset}")
    if not 0 <= col_offset <= 2**35 - cols:
        raise ValueError(f"{op}: col_offset must be in [0, 2**35 - cols], got {col_offset}")
    if not 0 <= sample < 2**32:
        raise ValueError(f"{op}: sample must be in [0, 2**32), got {sample}")
