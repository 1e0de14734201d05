"""The specification: every op in plain PyTorch, with the signature of its registered schema."""

from __future__ import annotations

from collections.abc import Callable

from .dense_sketch import dense_sketch, dense_sketch_adjoint, dense_sketch_entries
from .distinct_rows import distinct_rows
from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear, dropout_linear_dgrad, dropout_linear_wgrad
from .hadamard_transform import hadamard_transform
from .linear_dropout import act_dropout, act_dropout_grad, linear_dropout
from .sparse_sketch import csr_sketch, sparse_sketch, sparse_sketch_adjoint, sparse_sketch_entries

FUNCTIONS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        dropout_mask,
        dropout,
        dropout_linear,
        dropout_linear_dgrad,
        dropout_linear_wgrad,
        linear_dropout,
        act_dropout,
        act_dropout_grad,
        dense_sketch,
        dense_sketch_adjoint,
        dense_sketch_entries,
        distinct_rows,
        hadamard_transform,
        sparse_sketch,
        sparse_sketch_adjoint,
        sparse_sketch_entries,
        csr_sketch,
    )
}
