"""What a benchmark case declares. Cases say nothing about timing; the harness says nothing about ops.

A case file in `benchmarks/cases` holds one subclass of `Case`, found by its name, which is that of the op.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import effective_p, reference

Shape = tuple[int, ...]
Inputs = dict[str, Tensor]
Forward = Callable[[Inputs], Tensor]

PRESETS = ("smoke", "default", "full")
PASSES = ("forward", "forward+backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Cost(NamedTuple):
    """Least work of one call: bytes that must be read and written, floating-point operations of matrix products."""

    read: int
    written: int
    flops: int


class AnyCase(ABC):
    """One op: its shapes, its inputs, its least cost, and the ways to compute it."""

    op: str
    letters: str  # names of the sizes in a shape, "rows,cols" for example
    shapes: ClassVar[dict[str, dict[str, tuple[Shape, ...]]]]  # preset -> device type -> shapes
    passes: tuple[str, ...] = PASSES
    differentiable: tuple[str, ...] = ()  # inputs that get a gradient in forward+backward

    @abstractmethod
    def setup(self, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        """Inputs, with "grad", the gradient of the output, among them.

        Signs are chosen so that no kept element can come out as zero: then every decision shows in a result.
        """

    @abstractmethod
    def cost(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        """Least cost of a forward, or of a forward and its backward together: each tensor moves once."""

    @abstractmethod
    def randfuse(self, inputs: Inputs, key: Tensor | None = None) -> Tensor:
        """The public function; None draws a key, as in training."""

    @abstractmethod
    def baselines(self) -> dict[str, Forward]:
        """Other ways, by name. "eager" must be there; it is also what torch.compile is given.

        Kernels of other packages stand in `variants.PUBLIC` and import them when called.
        """

    @abstractmethod
    def floor(self, inputs: Inputs) -> Tensor:
        """The same work without randomness, by PyTorch."""

    def dtypes(self, device: str) -> tuple[str, ...]:
        return ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16")


class SamplerCase(AnyCase):
    """An op that yields tokens (…,) of logits (…, V) and has no derivative."""

    passes = PASSES[:1]

    def logits(self, inputs: Inputs) -> Tensor:
        """What tokens are drawn from."""
        return inputs["x"]

    @abstractmethod
    def tokens(self, inputs: Inputs, key: Tensor) -> Tensor:
        """The draw by the reference."""


class Case(AnyCase):
    """An op that drops elements with probability p and scales the rest."""

    p: float = 0.1

    @abstractmethod
    def exact(self, inputs: Inputs, factor: Tensor) -> Tensor:
        """The formula in plain PyTorch, in the dtype of the inputs; `factor` is 0 where dropped, else the scale.

        Without a `dropped_view`, the factor of the floor is a 1 that broadcasts.
        """

    @abstractmethod
    def dropped_view(self, out: Tensor, grads: Inputs) -> Tensor | None:
        """The (rows, cols) result in which dropped elements, and no others, are 0; None if there is none such."""

    @abstractmethod
    def mask(self, shape: Shape, key: Tensor) -> Tensor:
        """The decisions by the reference, True = kept (or counts of them), on the key's device."""

    def scale(self, exactly: bool) -> float:
        """Factor of kept elements: by the probability really used, or by the nominal one as PyTorch does."""
        return 1 / (1 - float(effective_p(self.p) if exactly else self.p))


def load() -> dict[str, AnyCase]:
    """All cases by op name."""
    cases = importlib.import_module(f"{__package__}.cases")  # lies in benchmarks/cases, where type checkers do not look
    names = [info.name for info in pkgutil.iter_modules(cases.__path__)]
    return {name: importlib.import_module(f"{cases.__name__}.{name}").CASE for name in names}


def positive(*shape: int, dtype: torch.dtype, device: str, mean: float = 1.0) -> Tensor:
    """Uniform on [mean/2, 3·mean/2): sums of these, or of their products, cannot cancel to zero."""
    return ((torch.rand(*shape, device=device) + 0.5) * mean).to(dtype)


def signed(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Standard normal, held away from zero so that a kept element never reads as a dropped one."""
    x = torch.randn(*shape, device=device)
    return x.where(x.abs() > 2**-10, 2**-10).to(dtype)


def drop(x: Tensor, factor: Tensor) -> Tensor:
    """x times the factor as PyTorch rounds it: in float32 (float64 for float64), then once to x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * factor.to(wide.dtype)).to(x.dtype)


def reference_mask(shape: Shape, p: float, key: Tensor, op: int, sample: int = 0) -> Tensor:
    return reference.dropout_mask(key, list(shape), p, None, op, sample, 0, 0)


def linear_cost(shape: Shape, itemsize: int, backward: bool) -> Cost:
    """Of y = x Wᵀ + b, shape (M, K, N); backward also reads grad and writes the gradients of x, W and b."""
    m, k, n = shape
    operands, out = m * k + n * k + n, m * n
    if backward:
        return Cost((operands + out) * itemsize, (out + operands) * itemsize, 6 * m * n * k)
    return Cost(operands * itemsize, out * itemsize, 2 * m * n * k)
