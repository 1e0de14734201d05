"""Fused random operations for PyTorch: random numbers are consumed where they are drawn and never stored.

Every decision is a pure function of (key, op, coordinates), the same on CPU, CUDA, Triton and in the reference.
"""

from . import _extension, _registry, ops
from ._backends import use_backend
from .keys import draw_key, effective_p, fold_in, key, split
from .ops import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [
    "draw_key",
    "effective_p",
    "fold_in",
    "key",
    "masked_diffusion",
    "nn",
    "patch",
    "sketch",
    "split",
    "use_backend",
    *ops.__all__,
]

if _extension.problem is None:
    _registry.install("randfuse")

from . import masked_diffusion, nn, sketch
from .nn.patch import patch
