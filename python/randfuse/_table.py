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


# Ops that have no CUDA kernel by design: Triton's own, and the reference where there is no Triton.
NO_CUDA = frozenset(
    {
        "accept_path",
        "block_dropout_linear",
        "block_dropout_linear_dgrad",
        "block_dropout_linear_wgrad",
        "dense_sketch",
        "dense_sketch_adjoint",
        "dense_sketch_entries",
        "dropconnect_linear",
        "kept_blocks",
        "lora_linear",
        "lora_linear_dgrad",
        "lora_linear_down",
        "lora_linear_wgrad",
        "mixout",
        "mixout_linear",
        "random_words",
        "tree_keys",
    }
)

# Ops that have no Triton kernel: CUDA's, and the reference where the extension has none.
NO_TRITON = frozenset({"hadamard_transform"})

# Ops that have no GPU kernel: on a GPU the reference runs.
CPU_ONLY = frozenset(
    {
        "csr_sketch",
        "distinct_rows",
        "multi_sample_cross_entropy_with_grads",  # by design: `ops/` calls it for CPU tensors
    }
)

_PRODUCTS = ("dropout_linear", "dropout_linear_dgrad", "dropout_linear_wgrad")
_SAMPLES = (
    "multi_sample_linear",
    "multi_sample_linear_dgrad",
    "multi_sample_linear_wgrad",
    "multi_sample_cross_entropy",
    "multi_sample_cross_entropy_grad",
)

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
        _SAMPLES,
        lambda n, k, size: 128 < n <= 2048 if size == 2 else n <= 128,
        "triton",
        "model, not yet measured: CUDA has no kernel there, and dropped copies cost two passes over x for every sample",
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
            a, b = args[2:4] if op == "multi_sample_cross_entropy_grad" else args[:2]
            n = a.shape[-1] if op.endswith("wgrad") else b.shape[-2]
            k = b.shape[-1]
            if entry.applies(n, k, a.element_size()):
                return entry.backend
    return "cuda"
