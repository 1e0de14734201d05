"""The specification: every op in plain PyTorch, with the signature of its registered schema."""

from __future__ import annotations

from collections.abc import Callable

from .block_dropout_linear import block_dropout_linear, block_dropout_linear_dgrad, block_dropout_linear_wgrad
from .categorical_sample import categorical_race, categorical_sample, categorical_sample_with_stats
from .dense_sketch import dense_sketch, dense_sketch_adjoint, dense_sketch_entries
from .distinct_rows import distinct_rows
from .dropconnect_linear import dropconnect_linear
from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear, dropout_linear_dgrad, dropout_linear_wgrad
from .hadamard_transform import hadamard_transform
from .kept_blocks import kept_blocks
from .linear_dropout import act_dropout, act_dropout_grad, linear_dropout
from .lora_linear import lora_linear, lora_linear_dgrad, lora_linear_down, lora_linear_wgrad
from .mixout_linear import mixout, mixout_linear
from .multi_sample_cross_entropy import (
    multi_sample_cross_entropy,
    multi_sample_cross_entropy_grad,
    multi_sample_cross_entropy_with_grads,
)
from .multi_sample_linear import multi_sample_linear, multi_sample_linear_dgrad, multi_sample_linear_wgrad
from .multi_sample_scale import multi_sample_scale
from .random_words import random_words
from .sparse_sketch import csr_sketch, sparse_sketch, sparse_sketch_adjoint, sparse_sketch_entries
from .speculative_accept import speculative_accept
from .speculative_accept_tree import accept_path, tree_keys

FUNCTIONS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        categorical_race,
        categorical_sample,
        categorical_sample_with_stats,
        dropout_mask,
        dropout,
        dropout_linear,
        dropout_linear_dgrad,
        dropout_linear_wgrad,
        linear_dropout,
        act_dropout,
        act_dropout_grad,
        dropconnect_linear,
        mixout,
        mixout_linear,
        block_dropout_linear,
        block_dropout_linear_dgrad,
        block_dropout_linear_wgrad,
        kept_blocks,
        multi_sample_cross_entropy,
        multi_sample_cross_entropy_grad,
        multi_sample_cross_entropy_with_grads,
        multi_sample_linear,
        multi_sample_linear_dgrad,
        multi_sample_linear_wgrad,
        multi_sample_scale,
        lora_linear,
        lora_linear_down,
        lora_linear_dgrad,
        lora_linear_wgrad,
        dense_sketch,
        dense_sketch_adjoint,
        dense_sketch_entries,
        distinct_rows,
        hadamard_transform,
        random_words,
        sparse_sketch,
        sparse_sketch_adjoint,
        sparse_sketch_entries,
        csr_sketch,
        speculative_accept,
        accept_path,
        tree_keys,
    )
}
