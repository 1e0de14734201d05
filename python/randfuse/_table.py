"""Dispatch table for CUDA tensors: which kernels are fastest at which shape, and how we know.

`cuda` is the hand-written kernel for narrow weights (N ≤ 128, 16-bit dtypes) and otherwise cuBLAS with an elementwise
mask; `triton` fuses the mask into its own GEMM. The first entry that applies wins; `cuda` where none does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Entry(NamedTuple):
    ops: tuple[str, ...]
    applies: Callable[[int, int, int], bool]  # of N (out features), K (in features), bytes an element
    backend: str
    evidence: str


_PRODUCTS = ("dropout_linear", "dropout_linear_dgrad", "dropout_linear_wgrad")
# On GPUs these exist in Triton and in the reference only.
TRITON_ONLY = frozenset({"lora_linear", "lora_linear_dgrad", "lora_linear_down", "lora_linear_wgrad"})

# Models: a read and a write of x beside a bf16 GEMM cost 367/N of it (4.3 TB/s against 790 TFLOP/s), of y 367/K; a
# prologue or epilogue inside the GEMM is taken to cost 5 to 15 %, which puts the crossover at 2.4k to 7k.
TABLE: tuple[Entry, ...] = (
    Entry(
        _PRODUCTS,
        lambda n, k, size: size == 2 and 128 < n <= 2048,
        "triton",
        "model, not yet measured: two passes over x cost at least 18 % of the GEMM, the fused mask at most 15 %",
    ),
    Entry(
        _PRODUCTS,
        lambda n, k, size: size == 4 and n <= 32,
        "triton",
        "model, not yet measured: 2N/4 flops a byte stay below 16, the ratio of fp32 rate and bandwidth: one read wins",
    ),
    Entry(
        ("linear_dropout",),
        lambda n, k, size: size == 2 and k <= 2048,
        "triton",
        "model, not yet measured: a read and a write of y cost at least 18 % of the GEMM, the fused epilogue less",
    ),
)


def choose(op: str, args: tuple[Any, ...]) -> str:
    """Backend of one call on CUDA tensors, from the shapes of its two operands."""
    for entry in TABLE:
        if op in entry.ops:
            a, b = args[0], args[1]
            n = a.shape[-1] if op == "dropout_linear_wgrad" else b.shape[0]
            k = b.shape[-1]
            if entry.applies(n, k, a.element_size()):
                return entry.backend
    return "cuda"
