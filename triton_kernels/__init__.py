"""Triton kernels; registers them as `torch.ops.randfuse_triton`. Imported on first use, never by `import randfuse`."""

from randfuse import _registry

from . import dropconnect_linear, dropout, dropout_linear, launch, linear_dropout, mixout_linear

__all__ = ["dropconnect_linear", "dropout", "dropout_linear", "linear_dropout", "mixout_linear"]

_registry.install(launch.NAMESPACE)
