"""Triton kernels; registers them as `torch.ops.randfuse_triton`. Imported on first use, never by `import randfuse`."""

from randfuse import _registry

from . import dropout, dropout_linear, launch, linear_dropout, lora_linear

__all__ = ["dropout", "dropout_linear", "linear_dropout", "lora_linear"]

_registry.install(launch.NAMESPACE)
