"""Activations in fp32 and their derivatives; ACT is one of `ACTIVATIONS`."""

import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "silu")


@triton.jit
def act(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)  # NaN stays NaN, as in F.relu
    elif ACT == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.5**0.5))
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def times_derivative(grad, z, ACT: tl.constexpr):
    """grad * act'(z)."""
    if ACT == "relu":
        grad = tl.where(z <= 0, 0.0, grad)  # the gradient of a NaN passes, as in F.relu
    elif ACT == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327  # 1/sqrt(2 pi)
        grad *= 0.5 * (1 + tl.erf(z * 0.5**0.5)) + z * density
    elif ACT == "silu":
        s = tl.sigmoid(z)
        grad *= s * (1 + z * (1 - s))
    return grad
