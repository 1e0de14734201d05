"""Checks shared by the ops that sample from rows of logits: temperature, filters, id tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST, LARGEST = 2.0**-100, 2.0**100  # of temperatures other than 0
MAX_VOCAB = 2**20


def parameters(
    op: str, shape: tuple[int, ...], device: torch.device, temperature: Any, top_k: Any, top_p: Any, min_p: Any
) -> tuple[Any, ...]:
    """The four as tensors () or (rows,) or None; `shape` is that of one value a row."""
    fraction = ("in [0, 1]", lambda v: (v >= 0) & (v <= 1))
    return (
        temperatures(op, "temperature", temperature, shape, device),
        parameter(op, "top_k", top_k, shape, device, torch.int64, "at least 1", lambda v: v >= 1),
        parameter(op, "top_p", top_p, shape, device, torch.float64, *fraction),
        parameter(op, "min_p", min_p, shape, device, torch.float64, *fraction),
    )


def temperatures(op: str, name: str, value: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if value is None:
        raise TypeError(f"{op}: {name} must be a number or a Tensor, got None")
    warm = ("0 or in [2**-100, 2**100]", lambda v: (v == 0) | ((v >= SMALLEST) & (v <= LARGEST)))
    return parameter(op, name, value, shape, device, torch.float64, *warm)


def parameter(
    op: str,
    name: str,
    value: Any,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    want: str,
    valid: Any,
) -> Any:
    """A number or tensor () or `shape` as a tensor () or (rows,) of `dtype`; values are checked where readable."""
    if value is None:
        return None
    number = (int,) if dtype == torch.int64 else (int, float)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, number):
            kind = "an int" if dtype == torch.int64 else "a number"
            raise TypeError(f"{op}: {name} must be {kind} or a Tensor, got {type(value).__name__}")
        if not valid(value):
            raise ValueError(f"{op}: {name} must be {want}, got {value}")
        return torch.full((), min(value, 2**62) if dtype == torch.int64 else value, dtype=dtype)
    if value.is_floating_point() != dtype.is_floating_point or value.dtype == torch.bool or value.is_complex():
        raise TypeError(
            f"{op}: {name} must be {'floating' if dtype.is_floating_point else 'integer'}, got {value.dtype}"
        )
    if value.dim() and tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape () or {shape}, got {tuple(value.shape)}")
    if value.device.type != "cpu" and value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} or the CPU, got {value.device}")
    if value.device.type == "cpu" and readable(value) and not bool(valid(value).all()):
        bad = value.masked_select(~valid(value))[0].item()
        raise ValueError(f"{op}: {name} must be {want}, got {bad}")
    return value.detach().to(dtype).reshape(-1) if value.dim() else value.detach().to(dtype)


def readable(x: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x))


def integers(op: str, name: str, x: object, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")
