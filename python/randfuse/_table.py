"""Dispatch table for CUDA tensors: which kernel is fastest at which shape, and how we know.

`cuda` is the hand-written kernel or, where that does not apply, cuBLAS with an elementwise mask; `triton` fuses the
mask into a GEMM. An entry is (op, applies, backend, evidence), the first match wins.
"""

from __future__ import annotations

from typing import Any


def _n(args: tuple[Any, ...]) -> int:
    return args[1].shape[0]  # out features of (x, weight, …)


TABLE: tuple[tuple[str, Any, str, str], ...] = (
    ("dropout_linear", lambda a: 128 < _n(a) <= 2048 and a[0].element_size() == 2, "triton",
     "model, not yet measured: separate passes over x cost 367/N of the GEMM, the fused prologue 5-15 %"),
)  # fmt: skip


def choose(op: str, args: tuple[Any, ...]) -> str:
    """Backend of one call; `cuda` unless an entry says otherwise."""
    for name, applies, backend, _ in TABLE:
        if name == op and applies(args):
            return backend
    return "cuda"
