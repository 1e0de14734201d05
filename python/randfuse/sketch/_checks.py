"""Argument checks that the algorithms share. What they raise names the algorithm, as everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import keys
from .._checks import float_tensor as float_tensor  # for the algorithms too


def matrix(op: str, name: str, x: object, *, rows: int | None = None, vector: bool = False) -> Tensor:
    """x as a finite, non-empty matrix of a dtype that LAPACK works in; with `vector`, of one column if it has none."""
    float_tensor(op, name, x)
    assert isinstance(x, Tensor)
    shape, x = tuple(x.shape), x.unsqueeze(-1) if vector and x.dim() == 1 else x
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{op}: {name} must be a matrix{' or vector' * vector} with elements, got shape {shape}")
    if rows is not None and x.shape[0] != rows:
        raise ValueError(f"{op}: {name} must have {rows} rows, got {x.shape[0]}")
    return finite(op, name, x).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def finite(op: str, name: str, x: Tensor) -> Tensor:
    if not x.sum().isfinite() and not x.isfinite().all():  # a sum is one read, and NaN or inf does not leave it
        raise ValueError(f"{op}: {name} must be finite, got {int((~x.isfinite()).sum())} elements that are not")
    return x


def whole(op: str, name: str, value: object, least: int, most: int) -> int:
    """`value` is an int in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{op}: {name} must be in [{least}, {most}], got {value}")
    return value


def number(op: str, name: str, value: object, least: float, most: float = float("inf")) -> float:
    """`value` is a number in [least, most]; NaN is in no interval."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{op}: {name} must be in [{least}, {most}], got {value}")
    return float(value)


def choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def key_for(op: str, key: Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The caller's scalar key or a fresh one."""
    keys.check(op, key, generator, 1, device)
    return keys.resolve(key, generator, device).reshape(())
