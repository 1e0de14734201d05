"""Loads `randfuse._C`, which registers `torch.ops.randfuse`. A failure is kept as a sentence, not raised."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

_module: Any = None
problem: str | None = None  # why the extension is not there and how to get it; None when it is

_FIX = "run `pip install --no-build-isolation -e .` in the randfuse checkout"
try:
    _module = importlib.import_module("._C", __package__)
except ModuleNotFoundError:
    problem = f"the C++ extension is not built; {_FIX}"
except ImportError as error:  # built against another torch, most often
    problem = f"the C++ extension does not load with torch {torch.__version__} ({error}); {_FIX}"
else:
    _built_with = _module.build_info()["torch"]
    if _built_with.split(".")[:2] != torch.__version__.split(".")[:2]:
        problem = f"the C++ extension was built with torch {_built_with}, this is {torch.__version__}; {_FIX}"
        _module = None
if problem:
    warnings.warn(f"randfuse: {problem}; until then the slow reference runs on the CPU", stacklevel=2)

has_cuda: bool = _module is not None and bool(_module.build_info()["cuda"])  # a constant that a compiler can read


def build_info() -> dict[str, Any]:
    """How the extension was built and which CPU instruction set it uses here."""
    if _module is None:
        raise RuntimeError(f"build_info: extension must be loaded, got: {problem}")
    return dict(_module.build_info())


def module() -> Any:
    """The pybind11 module, or None."""
    return _module
