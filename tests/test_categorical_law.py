"""The law of `categorical_sample` against float64, and samplers that must fail the same tests.

Every test has false-positive rate 1e-6 (fixed keys: it is right or wrong once and for all). With n draws a chi-square
of this size sees a total-variation error of sqrt(λ / 4n) with power 0.999; λ = 64, 96, 142 for 2, 16, 64 cells.
"""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
from randfuse import categorical_sample, use_backend

ALPHA = 1e-6
METHODS = ["cdf", "race"]


@pytest.fixture(autouse=True)
def _kernels():
    with use_backend("auto"):  # the reference gives the same tokens, test_categorical_sample.py
        yield


def chi_square_p(counts: torch.Tensor, p: torch.Tensor, cells: int = 64) -> float:
    """p-value of Pearson's test; tokens are merged by likelihood into cells of about equal mass, before the data."""
    n = float(counts.sum())
    order = p.argsort(descending=True)
    cell = (p[order].cumsum(0) - p[order] / 2).mul(cells).long().clamp(max=cells - 1)
    merged = torch.zeros(2, cells, dtype=torch.float64)
    merged[0].index_add_(0, cell, counts[order].double())
    merged[1].index_add_(0, cell, p[order] * n)
    impossible = merged[1] == 0
    assert not merged[0][impossible].any(), "a token of no probability was drawn"
    seen, expected = merged[:, ~impossible]
    small = expected < 5
    if small.any():
        seen = torch.cat([seen[~small], seen[small].sum().reshape(1)])
        expected = torch.cat([expected[~small], expected[small].sum().reshape(1)])
    if len(seen) < 2:
        return 1.0
    chi2 = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2.0, dtype=torch.float64), chi2 / 2))


def draws(logits: torch.Tensor, n: int, method: str, seed: int = 0, **kwargs) -> torch.Tensor:
    """n tokens of one row, from 64 rows that are all the same memory."""
    x = logits.unsqueeze(0).expand(64, -1)
    return categorical_sample(x, num_samples=n // 64, method=method, key=randfuse.key(seed), **kwargs).reshape(-1)


def law(logits: torch.Tensor, temperature: float, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """The definition, by a full sort in float64."""
    p, order = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    if top_k is not None:
        p[top_k:] = 0
    p /= p.sum()
    if top_p is not None:
        p[1:][p.cumsum(0)[:-1] >= top_p] = 0
    if min_p is not None:
        p[p < min_p * p[0]] = 0
    return torch.empty_like(p).scatter_(0, order, p / p.sum())


def counts_of(tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.bincount(tokens, minlength=vocab)


# V = 262144 costs the race 0.2 s a thousand draws; n there sees an error of 0.09, elsewhere of at most 0.012.
CASES = [(v, t, 2**18) for v in (2, 5, 64, 1025) for t in (0.1, 1.0, 2.0)] + [(262144, t, 2**12) for t in (0.3, 2.0)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("vocab", "temperature", "n"), CASES)
def test_chi_square(vocab, temperature, n, method):
    x = (torch.randn(vocab) * 2).bfloat16()
    tokens = draws(x, n, method, temperature=temperature)
    assert chi_square_p(counts_of(tokens, vocab), law(x, temperature)) > ALPHA


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("filters", [
    {"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 200, "top_p": 0.9, "min_p": 0.02},
], ids=str)  # fmt: skip
def test_chi_square_of_filtered_laws(filters, method):
    x = torch.randn(3000) * 2
    tokens = draws(x, 2**17, method, temperature=1.3, **filters)
    p = law(x, 1.3, **filters)
    assert (p[tokens] > 0).all(), "a token was drawn that a filter drops"
    assert chi_square_p(counts_of(tokens, 3000), p) > ALPHA


def test_chi_square_of_guidance_and_masks():
    x, u = torch.randn(300) * 2, torch.randn(300)
    allowed = torch.rand(300) < 0.7
    words = torch.zeros(320, dtype=torch.int64)
    words[:300] = allowed
    mask = (words.reshape(10, 32) << torch.arange(32)).sum(-1)
    mask = torch.where(mask >= 2**31, mask - 2**32, mask).to(torch.int32)
    tokens = draws(x, 2**18, "cdf", bitmask=mask.expand(64, 10), exclude=torch.tensor([3, 299]),
                   uncond_logits=u.expand(64, 300), cfg_scale=0.7)  # fmt: skip
    guided = torch.where(allowed, u + 1.7 * (x - u), -math.inf)
    guided[[3, 299]] = -math.inf
    assert chi_square_p(counts_of(tokens, 300), law(guided, 1.0)) > ALPHA


@pytest.mark.parametrize("method", METHODS)
def test_negative_control_a_temperature_off_by_three_percent_fails(method):
    x = torch.randn(64) * 2
    tokens = draws(x, 2**18, method, temperature=1.03)
    assert chi_square_p(counts_of(tokens, 64), law(x, 1.0)) < ALPHA


@pytest.mark.parametrize("method", METHODS)
def test_draws_rows_and_keys_are_independent(method):
    """Pairs of draws, of neighbouring rows and of neighbouring keys fill the 8 x 8 table evenly; n = 2^18."""
    x = torch.zeros(2**9, 8)
    tokens = torch.stack([categorical_sample(x, num_samples=2**9, method=method, key=randfuse.key(s)) for s in (7, 8)])
    for a, b in ((tokens[0, :, 1:], tokens[0, :, :-1]), (tokens[0, 1:], tokens[0, :-1]), (tokens[0], tokens[1])):
        assert chi_square_p(counts_of((a * 8 + b).reshape(-1), 64), torch.full((64,), 1 / 64).double()) > ALPHA


def poisson_range(mean: float) -> tuple[float, float]:
    """Counts outside have probability below 1e-6 on either side (Chernoff)."""
    spread = math.sqrt(2 * mean * math.log(1 / ALPHA))
    return mean - spread, mean + spread + math.log(1 / ALPHA)


def float32_gumbel_hits(n: int, tail: int, gap: float) -> int:
    """Draws of argmax(logits + Gumbel) in which a tail token beats the head, with uniforms k · 2⁻²⁴ as torch.rand has.

    The largest of `tail` such uniforms is the largest of as many continuous ones, U^(1/tail), rounded down.
    """
    largest = ((torch.rand(n, dtype=torch.float64) ** (1 / tail)) * 2**24).floor() / 2**24
    head = torch.rand(n, dtype=torch.float32).double()
    return int((-gap - (-largest.log()).log() > -(-head.log()).log()).sum())


def lattice_factor(p: float, bits: int = 24) -> float:
    """What a lattice of 2^-bits leaves of the probability p of an unlikely token: a / (e^a - 1), a = 2^-bits / p."""
    a = 2.0**-bits / p
    return a * math.exp(-a) / -math.expm1(-a)


# (gap, draws): 33 hits are expected of each; the race costs 0.13 s a thousand draws.
@pytest.mark.parametrize(("method", "gap", "n"), [("cdf", 20.5, 100_032), ("cdf", 18.0, 8192), ("race", 18.0, 8192)])
def test_far_tail(method, gap, n):
    """One head and 262144 tail tokens, each 1e-9 (gap 20.5) or 1.5e-8 (18) as likely: float32 Gumbel loses them."""
    tail = 262144
    x = torch.full((tail + 1,), -gap)
    x[0] = 0.0
    mass = tail * math.exp(-gap)
    expected = n * mass / (1 + mass)
    tokens = draws(x, n, method)
    low, high = poisson_range(expected)
    hits = int((tokens != 0).sum())
    assert low < hits < high, f"{hits} hits, expected {expected:.1f}"
    assert tokens[tokens != 0].unique().numel() > 0.8 * hits, "the hits spread over the tail"

    control = float32_gumbel_hits(n, tail, gap)
    predicted = expected * lattice_factor(math.exp(-gap))
    assert predicted < 0.1 * expected
    assert control < poisson_range(predicted)[1], f"float32 Gumbel: {control} hits, {predicted:.2f} predicted"
    assert control < low, f"the control must fail: {control} hits of {expected:.1f}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("r", [1e-2, 5e-3])
def test_mask_dominated_race(method, r):
    """Masked diffusion's own draw: [MASK] with 1 - r against Zipf tokens; P(unmask) and the law given it are right.

    Half-precision noise (2^-11, as forks of LLaDA use) is the control: it must lose what the lattice formula predicts.
    """
    vocab, n = 512, 2**19
    zipf = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    zipf /= zipf.sum()
    p = torch.cat([torch.tensor([1 - r], dtype=torch.float64), r * zipf])
    tokens = draws(p.log().float(), n, method)
    unmasked = tokens[tokens != 0] - 1
    low, high = poisson_range(n * r)
    assert low < len(unmasked) < high, f"{len(unmasked)} of {n} unmasked, expected {n * r:.0f}"
    assert chi_square_p(counts_of(unmasked, vocab), zipf, cells=16) > ALPHA

    m = 2**15
    u = (torch.rand(m, vocab + 1) * 2**11).floor() / 2**11
    control = int(((p.log() - (-u.double().log()).log()).argmax(-1) != 0).sum())
    # A uniform of 0 takes [MASK] itself out of the race; otherwise tokens lose what the lattice formula says.
    predicted = m * 2.0**-11 + m * r * sum(float(z) * lattice_factor(r * float(z), 11) for z in zipf)
    assert predicted < 0.75 * m * r
    # The formula takes tokens one by one; together they block each other by less than a tenth here.
    assert control < 1.1 * predicted + 6 * math.sqrt(predicted), f"half precision: {control}, predicted {predicted:.0f}"
    assert control < poisson_range(m * r)[0], f"the control must fail: {control} of {m * r:.0f}"


def test_tokens_of_no_probability_are_never_drawn():
    """2^18 draws among 2000 tokens, half of them -inf; the one token of a one-hot row always comes."""
    x = torch.randn(2000)
    x[::2] = -math.inf
    for method in METHODS:
        assert (draws(x, 2**17, method) % 2 == 1).all()
    x[:] = -math.inf
    x[1999] = 5.0
    for method in METHODS:
        assert (draws(x, 2**16, method) == 1999).all()
