"""Row samples: probabilities, sizes, marginals, covariances, the operator they make, approximate products."""

from __future__ import annotations

import functools
import math

import pytest
import randfuse
import torch
from randfuse import _extension, sketch
from randfuse.sketch import sampling

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

FIXED = ("systematic", "pivotal")
every = pytest.mark.parametrize("method", sampling.DRAWS)
M, K, T = 37, 9, 20000
WEIGHTS = torch.rand(M, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
WEIGHTS[5], WEIGHTS[6:8] = 50.0, 0.0


def units() -> torch.Tensor:
    return sampling._units("test", WEIGHTS, K)


@functools.cache
def draws(method: str) -> torch.Tensor:
    """(T, M) bool, in the given order."""
    return sampling.DRAWS[method](units(), randfuse.split(randfuse.key(7), T).unsqueeze(1))


def bisection(w: torch.Tensor, k: int) -> torch.Tensor:
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * w).clamp(max=1).sum() < k else (low, middle)
    return (high * w).clamp(max=1)


@pytest.mark.parametrize("k", [1, 2, 9, 20, 35])
def test_probabilities_are_water_filled(k):
    p = sketch.inclusion_probabilities(WEIGHTS, k)
    torch.testing.assert_close(p, bisection(WEIGHTS, k), rtol=0, atol=1e-7)
    assert p.sum() == k, "multiples of 2^-32 add up exactly"
    assert torch.equal(p > 0, WEIGHTS > 0)


def test_probabilities_of_ties_and_extremes():
    p = sketch.inclusion_probabilities(torch.ones(7), 3)
    torch.testing.assert_close(p, torch.full((7,), 3 / 7, dtype=torch.float64), rtol=0, atol=1e-8)
    p = sketch.inclusion_probabilities(torch.tensor([1e-200, 1e200, 1.0, 1.0], dtype=torch.float64), 3)
    assert p.sum() == 3
    assert p[0] > 0, "what has a weight has a chance"
    assert torch.equal(sketch.inclusion_probabilities(torch.rand(5) + 1, 5), torch.ones(5, dtype=torch.float64))


# z-scores of 37 marginals and, for rows with p in [0.1, 0.9], of their covariances, |z| < 6 (2e-9 each): a false alarm
# in 1e6. A marginal wrong by 0.02 is seen (z = 6), and so is a covariance of 0.011.


def z_of_marginals(drawn: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    error, deviation = drawn.double().mean(0) - p, (p * (1 - p) / len(drawn)).sqrt()
    return torch.where(deviation == 0, error * 1e9, error / deviation.clamp(min=1e-300))


def z_of_covariances(drawn: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """z-scores of E(x − p)(x − p)ᵀ off the diagonal, 0 on it, for rows neither rare nor nearly certain."""
    x = (drawn.double() - p)[:, (p > 0.1) & (p < 0.9)]
    variance = (x.square().T @ x.square()) / len(x)
    return ((x.T @ x) / (variance * len(x)).sqrt()).fill_diagonal_(0)


@every
def test_marginals_and_sizes(method):
    drawn, p = draws(method), sketch.inclusion_probabilities(WEIGHTS, K)
    assert z_of_marginals(drawn, p).abs().max() < 6, z_of_marginals(drawn, p)
    if method in FIXED:
        assert (drawn.sum(1) == K).all(), "the size is fixed"
    else:
        z = (drawn.sum(1).double().mean() - K) / ((p * (1 - p)).sum() / T).sqrt()
        assert abs(z) < 6
        assert z_of_covariances(drawn, p).abs().max() < 6, "coins are independent"


def test_pivotal_rows_repel():
    """No covariance of a pivotal sample is positive; systematic sampling in the given order, the control, has some."""
    p = sketch.inclusion_probabilities(WEIGHTS, K)
    z = z_of_covariances(draws("pivotal"), p)
    assert z.max() < 6
    assert z.min() < -20, "neighbours are rivals"
    assert z_of_covariances(draws("systematic"), p).max() > 6, "the control must be seen"


def test_successive_draws_fail_the_marginal_test():
    """Negative control: drawing without replacement in proportion to what is left (`torch.multinomial`)."""
    torch.manual_seed(0)
    drawn = torch.zeros(T, M).scatter_(1, torch.multinomial(WEIGHTS.expand(T, M), K), 1)
    assert z_of_marginals(drawn, sketch.inclusion_probabilities(WEIGHTS, K)).abs().max() > 6


def test_one_coin_for_all_duels_fails_the_covariance_test(monkeypatch):
    """Negative control: every duel of a draw decided by the same number."""
    words = sampling._words
    monkeypatch.setattr(sampling, "_words", lambda key, role, row: words(key, 0, row[:1] * 0).expand(-1, len(row)))
    assert z_of_covariances(draws.__wrapped__("pivotal"), sketch.inclusion_probabilities(WEIGHTS, K)).max() > 6


@pytest.mark.parametrize("method", FIXED)
def test_random_order_saves_periodic_data(method):
    """Every second row is 1, the others −1, p = 1/2: along the data systematic sampling takes one kind only."""
    m, k, t = 200, 100, 150
    data = torch.tensor([1.0, -1.0]).repeat(m // 2).double()

    def second_moment(order: str) -> float:
        keys = randfuse.split(randfuse.key(1), t)
        sums = [
            data[sketch.sample_rows(torch.ones(m), k, method=method, order=order, key=x).indices].sum() for x in keys
        ]
        return float(torch.stack(sums).square().mean())

    independent = m / 4
    assert second_moment("random") < 2 * independent
    if method == "systematic":
        assert second_moment("given") == k**2, "the control: 200 times the variance"


@every
def test_sample_is_an_operator(method):
    """E[SᵀS] = I, products and blocks those of the dense matrix."""
    s = sketch.sample_rows(WEIGHTS, K, method=method, key=randfuse.key(3))
    dense, a = s.to_dense(), torch.randn(M, 4, requires_grad=True)
    assert torch.equal(dense.nonzero()[:, 1], s.indices)
    torch.testing.assert_close(dense[dense > 0].double(), s.probabilities.rsqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(s @ a, dense @ a)
    torch.testing.assert_close(a.T @ s.T, a.T @ dense.T)
    y = torch.randn(len(s.indices), 3)
    torch.testing.assert_close(s.T @ y, dense.T @ y)
    block = s[1:5, 7:30]
    torch.testing.assert_close(block @ a[7:30], dense[1:5, 7:30] @ a[7:30])
    torch.testing.assert_close(block.T @ y[1:5], dense[1:5, 7:30].T @ y[1:5])
    halves = s.apply(a[:20], offset=0) + s.apply(a[20:], offset=20)
    torch.testing.assert_close(halves, s @ a)
    (s @ a).sum().backward()
    torch.testing.assert_close(a.grad, dense.sum(0).unsqueeze(1).expand(-1, 4))
    with pytest.raises(TypeError, match="operators must be determined by their keys"):
        sketch.sketch_many([s, s], a)


def test_identity_in_the_mean():
    p = sketch.inclusion_probabilities(WEIGHTS, K)
    possible = p > 0
    mean = (draws("pivotal") / p.clamp(min=1e-12)).mean(0)[possible]
    deviation = ((1 / p - 1) / T).sqrt()[possible]
    assert ((mean - 1) / deviation.clamp(min=1e-9)).abs().max() < 6


def test_empty_sample_is_an_operator():
    weights = torch.full((1000,), 1e-3)
    keys = (randfuse.key(seed) for seed in range(100))
    s = next(s for k in keys if not len((s := sketch.sample_rows(weights, 1, method="independent", key=k)).indices))
    assert (s @ torch.ones(1000, 2)).shape == (0, 2)
    assert torch.equal(s.T @ torch.ones(0, 2), torch.zeros(1000, 2))


def test_order_and_key_decide():
    one, two = (sketch.sample_rows(WEIGHTS, K, key=randfuse.key(s)).indices for s in (1, 2))
    assert not torch.equal(one, two)
    assert torch.equal(one, sketch.sample_rows(WEIGHTS, K, key=randfuse.key(1)).indices)
    given = sketch.sample_rows(WEIGHTS, K, order="given", key=randfuse.key(1)).indices
    assert torch.equal(given, sketch.sample_rows(WEIGHTS, K, order=torch.arange(M), key=randfuse.key(1)).indices)
    assert not torch.equal(given, one)


@every
def test_approx_matmul_is_unbiased(method):
    """z-tests of 6 entries and, for independent draws, of the error's size; |z| < 6 over 300 keys."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 60, dtype=torch.float64), torch.randn(60, 3, dtype=torch.float64) * torch.rand(60, 1)
    keys = randfuse.split(randfuse.key(2), 300)
    error = torch.stack([sketch.approx_matmul(a, b, 20, method=method, key=k) for k in keys]) - a @ b
    z = error.mean(0) / error.std(0) * len(keys) ** 0.5
    assert z.abs().max() < 6, z
    squares = error.square().sum((1, 2))
    weights = a.norm(dim=0) * b.norm(dim=1)
    expected = ((1 / sketch.inclusion_probabilities(weights, 20) - 1) * weights.square()).sum()
    if method == "independent":
        assert abs(squares.mean() - expected) < 6 * squares.std() / len(keys) ** 0.5
    else:
        assert squares.mean() < 1.1 * expected, "a fixed size is no worse here"


def test_approx_matmul_of_everything_is_the_product():
    a, b = torch.randn(3, 20, requires_grad=True), torch.randn(20, 4)
    product = sketch.approx_matmul(a, b, 20, key=randfuse.key(0))
    torch.testing.assert_close(product, a @ b)
    product.sum().backward()
    torch.testing.assert_close(a.grad, b.sum(1).expand(3, -1))


@pytest.mark.parametrize(
    ("weights", "k", "options", "error", "message"),
    [
        (torch.ones(5), 6, {}, ValueError, r"k must be in \[1, 5\], got 6"),
        (torch.tensor([1.0, 0.0]), 2, {}, ValueError, r"k must be in \[1, 1\], got 2"),
        (torch.zeros(5), 1, {}, ValueError, "weights must have a positive element, got zeros alone"),
        (torch.tensor([1.0, -1.0]), 1, {}, ValueError, "weights must be non-negative, got -1.0"),
        (torch.tensor([1.0, math.nan]), 1, {}, ValueError, "weights must be finite, got 1 elements"),
        (torch.ones(5, 1), 1, {}, ValueError, r"weights must have shape \(m,\) with elements, got \(5, 1\)"),
        (torch.ones(0), 1, {}, ValueError, r"weights must have shape \(m,\) with elements, got \(0,\)"),
        (torch.ones(5), 2.0, {}, TypeError, "k must be an int, got float"),
        (torch.ones(5, dtype=torch.int64), 2, {}, TypeError, "weights must be float32"),
        (torch.ones(5), 2, {"method": "multinomial"}, ValueError, "method must be one of independent, systematic"),
        (torch.ones(5), 2, {"order": "sorted"}, ValueError, "order must be one of random, given"),
        (torch.ones(5), 2, {"order": torch.arange(4)}, ValueError, r"order must be an int64 permutation \(5,\)"),
        (torch.ones(5), 2, {"order": torch.zeros(5, dtype=torch.int64)}, ValueError, "order must hold each of 0 … 4"),
        (torch.ones(5), 2, {"method": "independent", "order": "given"}, ValueError, "order must be left out"),
    ],
)
def test_errors(weights, k, options, error, message):
    with pytest.raises(error, match=f"^sample_rows: {message}"):
        sketch.sample_rows(weights, k, **options)


def test_approx_matmul_errors():
    with pytest.raises(ValueError, match="approx_matmul: b must have 5 rows, got 4"):
        sketch.approx_matmul(torch.ones(2, 5), torch.ones(4, 2), 2)
    with pytest.raises(ValueError, match=r"approx_matmul: b must be torch.float32 on cpu, got torch.float64"):
        sketch.approx_matmul(torch.ones(2, 5), torch.ones(5, 2, dtype=torch.float64), 2)
