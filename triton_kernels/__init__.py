"""Triton kernels; registers them as `torch.ops.randfuse_triton`. Imported on first use, never by `import randfuse`."""

from randfuse import _registry

from . import (
    block_dropout_linear,
    categorical_sample,
    dense_sketch,
    dropconnect_linear,
    dropout,
    dropout_linear,
    kept_blocks,
    launch,
    linear_dropout,
    lora_linear,
    mixout_linear,
    multi_sample_cross_entropy,
    multi_sample_linear,
    multi_sample_scale,
    random_words,
    sparse_sketch,
    speculative_accept,
    speculative_accept_tree,
)

__all__ = [
    "block_dropout_linear",
    "categorical_sample",
    "dense_sketch",
    "dropconnect_linear",
    "dropout",
    "dropout_linear",
    "kept_blocks",
    "linear_dropout",
    "lora_linear",
    "mixout_linear",
    "multi_sample_cross_entropy",
    "multi_sample_linear",
    "multi_sample_scale",
    "random_words",
    "sparse_sketch",
    "speculative_accept",
    "speculative_accept_tree",
]

_registry.install(launch.NAMESPACE)
