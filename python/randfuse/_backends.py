"""Which kernels run: one choice per call, made here and nowhere else."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _autocast, _extension, _registry, _table, reference

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_forced = "auto"  # a module global, so that compiled code guards on it


class use_backend(AbstractContextManager):
    """`with use_backend("triton"): …` forces one backend; "auto" lets the dispatch table choose.

    Decisions are the same on all of them, so this changes speed and rounding, never a mask. It is global to the
    process (do not overlap it between threads); enclose the backward pass too if that shall run on the same backend.
    Raises RuntimeError, saying why, when the backend is not available.
    """

    def __init__(self, backend: str) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"use_backend: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = unavailable(backend)
        if reason:
            raise RuntimeError(f"use_backend: backend must be available, got {backend!r}: {reason}")
        if backend == "triton":
            _triton()
        self.backend = backend
        self._previous: list[str] = []  # a stack: one instance may be entered again

    def __enter__(self) -> use_backend:
        global _forced
        self._previous.append(_forced)
        _forced = self.backend
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._previous.pop()


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run here and what to do about it, or None."""
    if backend == "cpu":
        return _extension.problem
    if backend == "cuda":
        if _extension.problem:
            return _extension.problem
        if not _extension.has_cuda:
            reason = _extension.build_info()["cuda_reason"]
            return f"the extension was built without CUDA ({reason}); then reinstall randfuse"
        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    if backend == "triton":
        if not _HAS_TRITON:
            return "Triton is not installed; `pip install triton`"
        if not torch.cuda.is_available() and not _interpreting():
            return "torch sees no CUDA device; set TRITON_INTERPRET=1 to run the kernels on the CPU (slowly)"
    return None


def call(op: str, *args: Any) -> Any:
    """Run `op` on the backend in force; `args` follow its schema, the first is a tensor on the device of the data."""
    _refuse_tangents(op, args)
    # The operands have their final dtypes: no product inside a kernel or the reference may be cast again.
    device = args[0].device.type
    if _autocast.enabled(device):
        with torch.autocast(device, enabled=False):
            return _resolve(op, args)(*args)
    return _resolve(op, args)(*args)


def _refuse_tangents(op: str, args: tuple[Any, ...]) -> None:
    """The kernels have reverse-mode derivatives only; without this a forward-mode tangent would vanish."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0 or _forced == "reference":
        return
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError(f"{op}: forward-mode derivatives must be taken under use_backend('reference')")


def _resolve(op: str, args: tuple[Any, ...]) -> Callable:
    device = args[0].device.type
    backend = chosen(op, *args)
    if backend == "reference":
        return reference.FUNCTIONS[op]
    if (backend in ("cpu", "cuda") and backend != device) or (
        backend == "triton" and device == "cpu" and not _interpreting()
    ):
        raise ValueError(f"{op}: backend {backend!r} must be given tensors of its device, got {device}")
    if backend in ("cuda", "triton") and op in _table.CPU_ONLY:
        raise ValueError(
            f"{op}: backend must be 'auto', 'cpu' or 'reference', got {backend!r}: it has no GPU kernel yet"
        )
    if backend == "cuda" and op in _table.NO_CUDA:
        raise ValueError(f"{op}: backend must be 'auto', 'triton' or 'reference' on a GPU, got 'cuda'")
    if backend == "triton":
        if op in _table.NO_TRITON:
            raise ValueError(f"{op}: backend must be 'auto', 'cpu', 'cuda' or 'reference', got 'triton'")
        _triton()
    kernels = "randfuse_triton" if backend == "triton" else "randfuse"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _registry.transformable(kernels)[op]
    return _registry.overload(kernels, op)


def chosen(op: str, *args: Any) -> str:
    """The backend that `call` would run."""
    return _auto(op, args[0].device.type, args) if _forced == "auto" else _forced


def _auto(op: str, device: str, args: tuple[Any, ...]) -> str:
    if device == "cpu":
        return "reference" if _extension.problem else "cpu"
    if device == "meta":  # shapes only: any registered op has them
        return "reference" if _extension.problem else "meta"
    if device != "cuda":
        raise ValueError(f"{op}: tensors must be on the CPU or a CUDA device, got {device}")
    if op in _table.CPU_ONLY:
        return "reference"
    if op in _table.NO_CUDA:
        return "triton" if _HAS_TRITON else "reference"
    has_triton = _HAS_TRITON and op not in _table.NO_TRITON
    if _extension.has_cuda and has_triton:
        return _table.choose(op, args)
    return "cuda" if _extension.has_cuda else "triton" if has_triton else "reference"


def _triton() -> None:
    from . import triton_kernels  # type: ignore[attr-defined]  # noqa: F401  registers torch.ops.randfuse_triton


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def rate(p: float | Tensor) -> tuple[float, Tensor | None]:
    """`p` as the two schema arguments `float p, Tensor? p_tensor`."""
    return (0.0, p.detach()) if isinstance(p, Tensor) else (float(p), None)
