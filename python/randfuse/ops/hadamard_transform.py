"""`hadamard_transform`: the Walsh–Hadamard transform along one dimension, its own adjoint.

No Triton kernel by design: a butterfly wants registers and shared memory. `benchmarks/sketch.py` measures it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks
from .._backends import call
from .._registry import rules


def hadamard_transform(x: Tensor, scale: float = 1.0, dim: int = -1) -> Tensor:
    """scale · H x along `dim`, for H in the order of Sylvester, unnormalised: H[i, j] = (−1)^popcount(i & j).

    Equivalent to: ``scale * torch.from_numpy(scipy.linalg.hadamard(n)).to(x) @ x`` along `dim`

    scale = n**-0.5 makes it orthogonal and its own inverse. Sums are float32 (float64 of float64 data), rounded once.

    Args:
        x: float32, float16, bfloat16 or (on the CPU) float64, any shape and strides; n = x.shape[dim] must be a power
            of two up to 2**24.
        scale: a factor.
        dim: the dimension that is transformed.

    Raises:
        TypeError, ValueError, IndexError: a wrong dtype, size, scale or dim, named in the message.

    Sylvester 1867; the fast form: Fino, Algazi, "Unified matrix treatment of the fast Walsh–Hadamard transform",
    IEEE Trans. Computers 1976.

    >>> hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([10., -2., -4.,  0.])
    """
    op = "hadamard_transform"
    _checks.float_tensor(op, "x", x)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a number, got {type(scale).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"{op}: dim must be in [{-x.dim()}, {x.dim() - 1}], got {dim}")
    n = x.shape[dim]
    if n < 1 or n > 2**24 or n & (n - 1):
        raise ValueError(f"{op}: x must have a power of two up to 2**24 elements along dim, got {n}")
    return call(op, x, float(scale), dim % x.dim())


def _fake(x: Tensor, scale: float, dim: int) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.scale, ctx.dim = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return call("hadamard_transform", grad, ctx.scale, ctx.dim), None, None


def _vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, scale: float, dim: int) -> Any:
    return call("hadamard_transform", x.movedim(in_dims[0], 0), scale, dim + 1), 0


rules("hadamard_transform", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
