"""The ways to compute a case: eager PyTorch, torch.compile, other public kernels, the floor, randfuse's backends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from .._backends import unavailable, use_backend
from .case import AnyCase, Forward

BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("auto", "cuda", "triton", "reference")}  # device -> randfuse's
PLAIN = (
    "eager",
    "native",
    "eager_top_k",
    "eager_top_p",
    "gumbel32",
    "float64",
    "race32",
    "multinomial",
    "race",
    "block",
    "match",
    "typical",
    "top_k",
    "top_p",
    "sampled",
    "softmax",
    "compile",
    "floor",
)
PUBLIC = {  # kernels of others, for GPUs only: the package each comes with, as it is imported and as it is installed
    "flashinfer": ("flashinfer", "flashinfer-python"),
    "flashinfer_probs": ("flashinfer", "flashinfer-python"),
    "vllm": ("vllm", "vllm"),
}


@dataclass
class Variant:
    name: str
    forward: Forward
    context: AbstractContextManager  # in force for forward and backward
    fused: bool = False  # randfuse's own: its decisions must be the reference's
    problem: str | None = None  # why it cannot run here


def choice(device: str, preset: str, asked: list[str] | None) -> list[str]:
    """Names of the variants to run. Unless asked for, a smoke run skips compiling (minutes), and the reference, which
    is no kernel, stays out wherever a kernel runs."""
    if asked is not None:
        return asked
    kernels = [b for b in BACKENDS[device] if b != "reference"]
    if all(unavailable(b) for b in kernels if b != "auto"):
        kernels.append("reference")
    plain = [n for n in PLAIN if not (n == "compile" and preset == "smoke")]
    return plain + (list(PUBLIC) if device == "cuda" else []) + kernels


def variants(case: AnyCase, device: str, names: list[str]) -> list[Variant]:
    """Those of `names` that exist for the case, each with its problem if it cannot run."""
    baselines = case.baselines()
    found = []
    for name in names:
        if name == "floor":
            found.append(Variant("floor", case.floor, nullcontext()))
        elif name == "compile":
            found.append(_compiled(baselines["eager"]))
        elif name in baselines:
            found.append(Variant(name, baselines[name], nullcontext(), problem=public_problem(device, name)))
        elif name not in PLAIN and name not in PUBLIC:
            found.append(_fused(case, device, name))
    return found


def _compiled(eager: Forward) -> Variant:
    torch._dynamo.reset()  # each shape is compiled afresh, none is charged for another's guards
    return Variant("compile", torch.compile(eager, dynamic=False), nullcontext())


def _fused(case: AnyCase, device: str, backend: str) -> Variant:
    name = f"randfuse {backend}"
    problem = backend_problem(device, backend)
    context = nullcontext() if problem else use_backend(backend)
    return Variant(name, case.randfuse, context, fused=True, problem=problem)


def public_problem(device: str, name: str) -> str | None:
    """Why a kernel of others cannot be measured on a device; None if it can, or is torch's."""
    if name not in PUBLIC:
        return None
    module, package = PUBLIC[name]
    if device != "cuda":
        return "runs on GPUs only; use --device cuda"
    return None if find_spec(module) else f"{module} is not installed; `pip install {package}`"


def backend_problem(device: str, backend: str) -> str | None:
    """Why a randfuse backend cannot be measured on a device, and what to do about it; None if it can."""
    if backend == "triton" and device == "cpu":
        return "Triton's kernels run on the CPU only in its interpreter, whose time says nothing; use --device cuda"
    if backend not in BACKENDS[device]:
        return f"runs on another device; use --device {'cuda' if device == 'cpu' else 'cpu'}"
    return unavailable(backend)
