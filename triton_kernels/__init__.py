"""Triton kernels; registers them as `torch.ops.randfuse_triton`. Imported on first use, never by `import randfuse`."""

from randfuse import _registry

from . import (
    dropout,
    dropout_linear,
    launch,
    linear_dropout,
    multi_sample_cross_entropy,
    multi_sample_linear,
    multi_sample_scale,
)

__all__ = [
    "dropout",
    "dropout_linear",
    "linear_dropout",
    "multi_sample_cross_entropy",
    "multi_sample_linear",
    "multi_sample_scale",
]

_registry.install(launch.NAMESPACE)
