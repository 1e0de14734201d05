"""Leverage scores and sensitivities, least squares with a sketch, low-rank factors, the size of a sketch."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
from randfuse import _extension, sketch

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

KEY = randfuse.key(3)


def matrix(m: int, n: int, condition: float = 10.0, seed: int = 0) -> torch.Tensor:
    """Random singular vectors, singular values from 1 to 1/condition."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(k, n, dtype=torch.float64, generator=g)).Q for k in (m, n))
    return u * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) @ v.T


# --- rows


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_leverage_scores_are_the_hat_matrix_diagonal(ridge):
    a = matrix(60, 7)
    hat = a @ torch.linalg.solve(a.T @ a + ridge * torch.eye(7, dtype=torch.float64), a.T)
    torch.testing.assert_close(sketch.leverage_scores(a, ridge=ridge), hat.diagonal())


def test_leverage_scores_of_deficient_rank_and_of_wide_matrices():
    a = matrix(60, 5)
    twice = torch.cat((a, a @ torch.randn(5, 3, dtype=torch.float64)), 1)
    torch.testing.assert_close(sketch.leverage_scores(twice), sketch.leverage_scores(a))
    torch.testing.assert_close(sketch.leverage_scores(a.T @ torch.randn(60, 60).double()), torch.ones(5).double())
    assert torch.equal(sketch.leverage_scores(torch.zeros(4, 2)), torch.zeros(4))


def test_ill_conditioned_leverage_scores():
    """At condition 1e8 the normal equations have no digit left; these have eight."""
    a = matrix(200, 10, 1e8)
    exact = torch.linalg.svd(a, full_matrices=False).U.square().sum(1)
    torch.testing.assert_close(sketch.leverage_scores(a), exact, rtol=1e-6, atol=0)


def test_sketched_leverage_scores():
    a = matrix(5000, 20)
    a[17] *= 100
    exact = sketch.leverage_scores(a)
    ratio = sketch.leverage_scores(a, method="sketched", key=KEY) / exact
    assert ratio.min() > 0.6
    assert ratio.max() < 2
    rough = sketch.leverage_scores(a, method="sketched", probes=100, key=KEY) / exact
    assert rough.min() > 0.3
    assert rough.max() < 3
    whole = sketch.leverage_scores(a, method="sketched", ridge=0.1, size=5000, key=KEY)
    torch.testing.assert_close(whole, sketch.leverage_scores(a, ridge=0.1), rtol=0.3, atol=0)
    again = sketch.leverage_scores(a, method="sketched", key=KEY)
    assert torch.equal(again, ratio * exact) or torch.allclose(again, ratio * exact)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 4.0, 8.0])
def test_lewis_weights_are_a_fixed_point(p):
    a = matrix(80, 4)
    a[3], a[9] = a[3] * 1e3, 0.0
    w = sketch.lewis_weights(a, p)
    scale = torch.where(w > 0, w, 1.0).pow(0.5 - 1 / p)
    torch.testing.assert_close(sketch.leverage_scores(a * scale.unsqueeze(1)), w, rtol=1e-5, atol=1e-9)
    assert abs(w.sum() - 4) < 1e-6
    assert w[9] == 0


def test_exact_sensitivities_of_order_one_are_those_of_linear_programs():
    """min ‖Ax‖₁ with ⟨aᵢ, x⟩ = 1, by SciPy's solver."""
    optimize = pytest.importorskip("scipy.optimize")
    a = matrix(25, 3)
    got = sketch.lp_sensitivities(a, 1.0, method="exact")
    for i in (0, 7, 24):
        one = torch.eye(25, dtype=torch.float64)
        upper = torch.cat((torch.cat((a, -one), 1), torch.cat((-a, -one), 1)))
        cost = [0.0] * 3 + [1.0] * 25
        equal = torch.cat((a[i], torch.zeros(25, dtype=torch.float64)))[None]
        free = [(None, None)] * 28
        answer = optimize.linprog(cost, upper.numpy(), [0.0] * 50, equal.numpy(), [1.0], free)
        assert abs(got[i] * answer.fun - 1) < 1e-3, f"row {i}: {got[i]} against {1 / answer.fun}"


@pytest.mark.parametrize("p", [1.5, 3.0, 6.0])
def test_exact_sensitivities_are_maxima(p):
    """No direction does better than the answer, and the best of many random ones nearly as well."""
    a = matrix(25, 3)
    got = sketch.lp_sensitivities(a, p, method="exact")
    x = torch.randn(3, 40000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tried = (a @ x).abs().pow(p)
    sampled = (tried / tried.sum(0)).amax(1)
    assert (got >= sampled - 1e-12).all()
    assert (got <= 1.02 * sampled).all(), "40000 directions of a three-dimensional space come near"


@pytest.mark.parametrize("p", [1.0, 1.3, 2.0, 2.5, 6.0])
def test_bounds_are_bounds(p):
    a = matrix(30, 4)
    a[3] *= 30
    bound, exact = sketch.lp_sensitivities(a, p), sketch.lp_sensitivities(a, p, method="exact")
    assert (bound >= exact * (1 - 1e-9)).all()
    assert bound.sum() <= 4 ** max(1.0, p / 2) * (1 + 1e-6)


# --- least squares


@pytest.mark.parametrize("condition", [10.0, 1e4, 1e8])
@pytest.mark.parametrize("noise", [1e-6, 1.0])
def test_lstsq_reaches_lapacks_residual(condition, noise):
    a = matrix(3000, 40, condition)
    b = a @ torch.ones(40, 2, dtype=torch.float64)
    b = b / b.norm(dim=0) + noise * torch.nn.functional.normalize(torch.randn(3000, 2, dtype=torch.float64), dim=0)
    lapack = torch.linalg.lstsq(a, b).solution
    got = sketch.lstsq(a, b, key=KEY)
    best = (a @ lapack - b).norm(dim=0)
    assert ((a @ got.solution - b).norm(dim=0) <= best * (1 + 1e-10)).all()
    # a backward-stable solver leaves a gradient of rounding size; the first round of LSQR alone does not at 1e8
    gradient = (a.T @ (a @ got.solution - b)).norm(dim=0)
    assert (gradient <= 4 * (a.T @ (a @ lapack - b)).norm(dim=0) + 1e-15).all()
    torch.testing.assert_close(got.residuals, best.square(), rtol=1e-8, atol=0)
    assert got.rank == 40
    assert 0 < got.iterations < 120


def test_lstsq_of_vectors_float32_and_deficient_rank():
    a, x = matrix(500, 6).float(), torch.randn(6)
    got = sketch.lstsq(a, a @ x, key=KEY)
    assert got.solution.shape == (6,)
    assert got.residuals.shape == ()
    assert got.solution.dtype == torch.float32
    torch.testing.assert_close(got.solution, x, rtol=1e-3, atol=1e-4)
    twice = torch.cat((a, a), 1).double()
    b = torch.randn(500, dtype=torch.float64)
    got = sketch.lstsq(twice, b, key=KEY)
    assert got.rank == 6
    torch.testing.assert_close(got.solution, torch.linalg.pinv(twice) @ b, rtol=1e-6, atol=1e-8)
    square = matrix(8, 8)
    torch.testing.assert_close(sketch.lstsq(square, b[:8], key=KEY).solution, torch.linalg.solve(square, b[:8]))


def test_sketch_and_solve():
    """The residual is 1 + n/(2 size) times the best or so, and the mean over keys of the solution is not biased."""
    a, b = matrix(4000, 10), torch.randn(4000, dtype=torch.float64)
    best = torch.linalg.lstsq(a, b[:, None]).solution.squeeze(1)
    ratios, solutions = [], []
    for seed in range(60):
        got = sketch.lstsq(a, b, method="sketch", size=200, key=randfuse.key(seed))
        assert got.iterations == 0
        ratios.append((got.residuals / (a @ best - b).square().sum()).item())
        solutions.append(got.solution)
    assert min(ratios) > 1.0
    assert abs(sum(ratios) / 60 - (1 + 10 / 190)) < 0.02
    error = torch.stack(solutions) - best
    assert (error.mean(0) / error.std(0) * 60**0.5).abs().max() < 5


def test_lstsq_says_when_it_does_not_converge():
    a, b = matrix(1000, 20), torch.randn(1000, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="lstsq: LSQR must converge in 3 iterations, got a gradient of"):
        sketch.lstsq(a, b, max_iterations=3, key=KEY)


# --- low rank


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (2, 3, 30, 50)])
def test_svd_lowrank_is_torchs(shape):
    torch.manual_seed(0)
    a = torch.randn(*shape[:-1], 5, dtype=torch.float64) @ torch.randn(*shape[:-2], 5, shape[-1], dtype=torch.float64)
    u, s, v = sketch.svd_lowrank(a, 6, key=KEY)
    torch.testing.assert_close(u * s.unsqueeze(-2) @ v.mT, a)
    torch.testing.assert_close(s[..., :5], torch.linalg.svdvals(a)[..., :5])
    for one, two in zip((u, s, v), torch.svd_lowrank(a, 6), strict=True):
        assert one.shape == two.shape
    eye = torch.eye(6, dtype=torch.float64).expand(*shape[:-2], 6, 6)
    torch.testing.assert_close(u.mT @ u, eye)
    torch.testing.assert_close(v.mT @ v, eye)
    torch.manual_seed(1)
    assert torch.equal(sketch.svd_lowrank(a, 6, key=KEY)[0], u), "a function of its arguments"


def test_svd_lowrank_error_and_mean():
    """E‖A − QQᵀA‖² ≤ (1 + k/(q − k − 1)) Σ_{j>k} σⱼ² without iterations; less with; a mean is taken off."""
    a = matrix(200, 50, 1e3)
    best = torch.linalg.svdvals(a)[10:].square().sum()
    errors = []
    for niter in (0, 2):
        u, s, v = sketch.svd_lowrank(a, 20, niter, key=KEY)
        errors.append((a - u * s @ v.T).square().sum())
    assert errors[0] < 1.5 * (1 + 10 / 9) * best
    assert errors[1] < min(errors[0], best)
    mean = a.mean(0, keepdim=True)
    for one, two in zip(
        sketch.svd_lowrank(a, 5, M=mean, key=KEY), sketch.svd_lowrank(a - mean, 5, key=KEY), strict=True
    ):
        torch.testing.assert_close(one, two)


# --- the size of a sketch


def test_ridgeless_risk_is_that_of_simulated_regression():
    """n = 200, p = 100, orthogonal sketch: within 5 standard errors of 40 regressions on each side of the peak."""
    n, p, alpha, sigma = 200, 100, 1.0, 0.7
    for psi in (0.25, 0.8):
        risks = []
        for seed in range(40):
            g = torch.Generator().manual_seed(seed)
            x, beta = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, p), (p, 1)))
            beta = alpha * beta / beta.norm()
            y = x @ beta + sigma * torch.randn(n, 1, generator=g, dtype=torch.float64)
            s = sketch.SRDCT(int(psi * n), n, key=randfuse.key(seed))
            fitted = torch.linalg.lstsq(s @ x, s @ y, driver="gelsd").solution
            risks.append((fitted - beta).square().sum())
        risks = torch.stack(risks)
        expected = sketch.ridgeless_risk(p / n, psi, signal=alpha, noise=sigma)
        assert abs(risks.mean() - expected) < 5 * risks.std() / 40**0.5 + 0.02 * expected, (psi, risks.mean(), expected)


@pytest.mark.parametrize(
    ("alpha", "sigma", "phi"), [(2, 1, 0.9), (2, 1, 1.9), (2, 1, 0.3), (2, 1, 3), (1, 2, 0.5), (1, 2, 0.1)]
)
def test_optimal_size_is_the_minimum_of_the_risk(alpha, sigma, phi):
    n = 1000
    p = round(phi * n)
    best = sketch.optimal_sketch_size(n, p, signal=alpha, noise=sigma)
    risks = [sketch.ridgeless_risk(p / n, size / n, signal=alpha, noise=sigma) for size in range(n + 1)]
    assert risks[best] <= min(risks) + 1e-3


# --- errors

A, B = torch.randn(30, 4), torch.randn(30)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sketch.leverage_scores(A[0]), ValueError, "leverage_scores: a must be a matrix with elements, got"),
        (
            lambda: sketch.leverage_scores(A * math.nan),
            ValueError,
            "leverage_scores: a must be finite, got 120 elements",
        ),
        (
            lambda: sketch.leverage_scores(A, size=9),
            ValueError,
            "leverage_scores: size, probes, key and generator must be",
        ),
        (
            lambda: sketch.leverage_scores(A.T, method="sketched"),
            ValueError,
            "leverage_scores: a must have at least as",
        ),
        (
            lambda: sketch.leverage_scores(A, method="sketched", size=31),
            ValueError,
            r"size must be in \[4, 30\], got 31",
        ),
        (lambda: sketch.leverage_scores(A, ridge=-1), ValueError, r"leverage_scores: ridge must be in \[0.0, inf\]"),
        (lambda: sketch.lewis_weights(A, 0), ValueError, "lewis_weights: p must be positive and finite, got 0"),
        (
            lambda: sketch.lp_sensitivities(A, 0.5),
            ValueError,
            r"lp_sensitivities: p must be in \[1.0, 1000.0\], got 0.5",
        ),
        (
            lambda: sketch.lstsq(A.T, B[:4]),
            ValueError,
            r"lstsq: a must have at least as many rows as columns, got \(4, 30\)",
        ),
        (lambda: sketch.lstsq(A, B[:7]), ValueError, "lstsq: b must have 30 rows, got 7"),
        (lambda: sketch.lstsq(A, B / 0), ValueError, "lstsq: b must be finite"),
        (lambda: sketch.lstsq(A, B.double()), ValueError, "lstsq: b must be torch.float32 on cpu, got torch.float64"),
        (lambda: sketch.lstsq(A, B, size=31), ValueError, r"lstsq: size must be in \[5, 30\], got 31"),
        (lambda: sketch.lstsq(A, B, method="qr"), ValueError, "lstsq: method must be one of precondition, sketch"),
        (lambda: sketch.svd_lowrank(A, 5), ValueError, r"svd_lowrank: q must be in \[1, 4\], got 5"),
        (lambda: sketch.svd_lowrank(A, 2, -1), ValueError, "svd_lowrank: niter must be in"),
        (
            lambda: sketch.svd_lowrank(A, 2, M=torch.ones(3, 30, 4)),
            ValueError,
            r"svd_lowrank: M must broadcast to \(30, 4\)",
        ),
        (lambda: sketch.svd_lowrank(A[0], 2), ValueError, "svd_lowrank: A must be dense"),
        (lambda: sketch.svd_lowrank(A.to_sparse_csr(), 2), ValueError, "svd_lowrank: A must be dense"),
        (
            lambda: sketch.optimal_sketch_size(0, 5, signal=1, noise=1),
            ValueError,
            "optimal_sketch_size: samples must be in",
        ),
        (
            lambda: sketch.ridgeless_risk(0.5, 2, signal=1, noise=1),
            ValueError,
            r"ridgeless_risk: psi must be in \[0.0, 1.0\]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
