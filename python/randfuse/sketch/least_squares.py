"""Least squares with a sketch: to full accuracy by preconditioning, or at once and roughly; and how small a sketch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from .sparse import SJLT

METHODS = ("precondition", "sketch")


class LeastSquares(NamedTuple):
    solution: Tensor  # (n,) or (n, k)
    residuals: Tensor  # () or (k,): squared norms of a x − b
    rank: int
    iterations: int  # products with a and aᵀ; 0 when only the sketch was solved


def lstsq(
    a: Tensor,
    b: Tensor,
    *,
    method: str = "precondition",
    size: int | None = None,
    max_iterations: int = 200,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LeastSquares:
    """The x that minimises ‖a x − b‖ for a tall matrix a: what `torch.linalg.lstsq(a, b)` computes in O(m n²).

    "precondition" factors an SJLT of a (8 nonzeros a column): with its factor R, a R⁻¹ is nearly orthonormal, so LSQR
    converges in some thirty products whatever the condition of a. A second round solves for the residual's correction,
    which brings the solution to what backward-stable solvers reach. "sketch" returns the solution of the sketched
    problem, whose residual is a factor 1 + O(n / size) too large. Where `size` is m, a itself is factored.

    Args:
        a: (m, n), m ≥ n; float64 computes in float64, everything else in float32.
        b: (m,) or (m, k).
        method: "precondition" or "sketch".
        size: rows of the sketch in (n, m]; 16n by default, at most m.
        max_iterations: of LSQR in each round.
        key, generator: see `randfuse.key`.

    Returns:
        A named tuple `solution, residuals, rank, iterations`. Directions of a beyond its numerical rank get 0.

    Raises:
        RuntimeError: LSQR did not converge, which a size near n can cause.

    Avron, Maymounkov, Toledo, "Blendenpik", SIAM J. Scientific Computing 2010; Epperly, Meier, Nakatsukasa, "Fast
    randomized least-squares solvers can be just as accurate and stable as classical direct solvers", 2024.

    >>> a, x = torch.randn(1000, 5), torch.randn(5)
    >>> torch.allclose(lstsq(a, a @ x).solution, x, atol=1e-4)
    True
    """
    op = "lstsq"
    _checks.choice(op, "method", method, METHODS)
    x = _checks.matrix(op, "a", a)
    m, n = x.shape
    rhs = _checks.matrix(op, "b", b, rows=m, vector=True)
    if rhs.dtype != x.dtype or rhs.device != x.device:
        raise ValueError(f"{op}: b must be {x.dtype} on {x.device}, got {rhs.dtype} on {rhs.device}")
    if m < n:
        raise ValueError(f"{op}: a must have at least as many rows as columns, got {tuple(x.shape)}")
    size = min(m, 16 * n) if size is None else _checks.whole(op, "size", size, min(n + 1, m), m)
    max_iterations = _checks.whole(op, "max_iterations", max_iterations, 1, 10**6)
    key = _checks.key_for(op, key, generator, x.device)
    operator = SJLT(size, m, nnz=min(8, size), key=key)
    small, small_rhs = (x, rhs) if size == m else (operator @ x, operator @ rhs)
    u, s, vt = torch.linalg.svd(small, full_matrices=False)
    rank = int((s > s[0] * m * torch.finfo(s.dtype).eps).sum())
    right = vt[:rank].T / s[:rank]  # R⁻¹: a @ right is nearly orthonormal
    solution = right @ (u[:, :rank].T @ small_rhs)
    iterations = 0
    for _ in range(2 if method == "precondition" else 0):
        correction, steps = _lsqr(x, right, rhs - x @ solution, rhs.norm(dim=0), max_iterations)
        solution = solution + right @ correction
        iterations += steps
    residuals = (rhs - x @ solution).square().sum(0)
    if b.dim() == 1:
        solution, residuals = solution.squeeze(1), residuals.squeeze(0)
    return LeastSquares(solution, residuals, rank, iterations)


def _lsqr(a: Tensor, right: Tensor, r: Tensor, scale: Tensor, most: int) -> tuple[Tensor, int]:
    """min ‖a right z − r‖ for each column of r (Paige, Saunders 1982), until aᵀr or r is rounding noise."""
    eps = torch.finfo(r.dtype).eps
    beta = r.norm(dim=0)
    u = r / _or_one(beta)
    v = right.T @ (a.T @ u)
    alpha = v.norm(dim=0)
    v = v / _or_one(alpha)
    w, z = v, torch.zeros_like(v)
    phi, rho_bar = beta, alpha
    for step in range(1, most + 1):
        u = a @ (right @ v) - alpha * u
        beta = u.norm(dim=0)
        u = u / _or_one(beta)
        v = right.T @ (a.T @ u) - beta * v
        alpha = v.norm(dim=0)
        v = v / _or_one(alpha)
        rho = torch.hypot(rho_bar, beta)
        c, s = rho_bar / _or_one(rho), beta / _or_one(rho)
        z = z + phi * c / _or_one(rho) * w
        w = v - s * alpha / _or_one(rho) * w
        gradient = phi * s * alpha * c.abs()  # ‖(a right)ᵀ r‖ of this step
        rho_bar, phi = -c * alpha, phi * s
        if bool(((gradient <= eps * phi) | (phi <= eps * scale)).all()):
            return z, step
    raise RuntimeError(f"lstsq: LSQR must converge in {most} iterations, got a gradient of {float(gradient.max()):.2g}")


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def ridgeless_risk(phi: float, psi: float, *, signal: float, noise: float, sketch: str = "orthogonal") -> float:
    """Limit of the excess risk of least squares (of least norm) fitted to ψ·n sketched rows of n samples.

    Samples (n, p), φ = p / n, with isotropic rows; signal² = ‖β‖², noise² the variance of the response. ψ > φ:
    σ²φ/(ψ − φ) after an "orthogonal" sketch (SRHT), plus σ²φ/(1 − φ) after an "iid" one (Gaussian, SJLT; φ < 1); ψ < φ:
    α²(1 − ψ/φ) + σ²ψ/(φ − ψ), whatever the sketch. At ψ = φ it has no limit.

    Chen, Zeng, Yang, Sun, "Sketched ridgeless linear regression: the role of downsampling", ICML 2023.

    >>> ridgeless_risk(0.5, 1.0, signal=1.0, noise=1.0)
    1.0
    """
    op = "ridgeless_risk"
    phi, psi = _checks.number(op, "phi", phi, 1e-300), _checks.number(op, "psi", psi, 0.0, 1.0)
    signal, noise = _checks.number(op, "signal", signal, 0.0), _checks.number(op, "noise", noise, 0.0)
    _checks.choice(op, "sketch", sketch, ("orthogonal", "iid"))
    if psi == phi:
        return float("inf")
    if psi < phi:
        return signal**2 * (1 - psi / phi) + noise**2 * psi / (phi - psi)
    return noise**2 * (phi / (psi - phi) + (phi / (1 - phi) if sketch == "iid" else 0.0))


def optimal_sketch_size(samples: int, features: int, *, signal: float, noise: float) -> int:
    """How many rows n samples should be sketched to before ridgeless regression: in [0, samples].

    With α = signal, σ = noise and φ = features / samples, ψ = φ(1 − σ/α) of the samples if σ < α and
    1 − σ/(2α) < φ ≤ α/(α − σ); 0, that is the estimate 0, if α ≤ σ and φ ≥ α²/(α² + σ²); all of them otherwise.
    See `ridgeless_risk`. Signal and noise are standard deviations; only their ratio counts.

    >>> optimal_sketch_size(1000, 1000, signal=2.0, noise=1.0)  # at the peak of double descent half is better
    500
    """
    op = "optimal_sketch_size"
    n, p = _checks.whole(op, "samples", samples, 1, 2**62), _checks.whole(op, "features", features, 1, 2**62)
    alpha, sigma = _checks.number(op, "signal", signal, 0.0), _checks.number(op, "noise", noise, 0.0)
    if alpha == sigma == 0:
        raise ValueError(f"{op}: signal must be positive where noise is 0, got 0")
    phi = p / n
    if sigma < alpha and 1 - sigma / (2 * alpha) < phi <= alpha / (alpha - sigma):
        return round(p * (1 - sigma / alpha))
    return 0 if alpha <= sigma and phi >= alpha**2 / (alpha**2 + sigma**2) else n
