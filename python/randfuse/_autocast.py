"""Autocast for the public functions: operands of a matrix product are cast as `F.linear` would cast them.

Done here and not on the registered op, whose rule would also round a tensor p to the low precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def enabled(device: str) -> bool:
    """Whether autocast is on for a device type; asking about one that has none (meta) raises in torch."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the autocast dtype of x's device if autocast is on there; float64 is left alone."""
    device = x.device.type
    if not enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *others)
    )
