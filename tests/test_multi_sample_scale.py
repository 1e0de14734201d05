"""multi_sample_scale and the mean of multi_sample_linear: the law of the counts, exact means, equality, derivatives."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _extension, reference
from randfuse._backends import call
from randfuse.reference import streams
from randfuse.reference.multi_sample_scale import multi_sample_count
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

needs_extension = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
SHAPES = [(1, 1), (3, 7), (5, 64), (4, 3, 130), (0, 5), (5, 0)]


def counts(key, shape, samples, p, row_offset=0, col_offset=0):
    thresholds = streams.count_thresholds(streams.threshold(p), samples)
    return multi_sample_count(key, list(shape), thresholds, row_offset, col_offset)


def law(samples, p):
    """P(k of M masks keep), k = 0 … M, for the probability that masks really use; exact fractions."""
    drop = Fraction(streams.threshold(p), 65536)
    return [math.comb(samples, k) * (1 - drop) ** k * drop ** (samples - k) for k in range(samples + 1)]


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 31, 128])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_thresholds_are_the_binomial(samples, p):
    """Each is its cumulative probability at 2**-32, within half a step and what 46 binary places lose; tensors too."""
    thresholds = streams.count_thresholds(streams.threshold(p), samples)
    below = Fraction(0)
    for t, mass in zip(thresholds, law(samples, p), strict=False):
        below += mass
        assert abs(t - below * 2**32) <= Fraction(1, 2) + Fraction(samples**2, 2**16), "threshold is off the law"
    tensors = streams.count_thresholds(streams.threshold(torch.tensor(p, dtype=torch.float64)), samples)
    assert [int(t) for t in tensors] == thresholds
    assert float(streams.count_scale(tensors)) == streams.count_scale(thresholds)
    # The scale is one over the mean of the table as it stands, in float64.
    mean = sum(Fraction(2**32 - t, 2**32) for t in thresholds)
    assert abs(Fraction(streams.count_scale(thresholds)) * mean - 1) < Fraction(1, 2**50), "the mean must be exact"


@pytest.mark.parametrize(("samples", "p"), [(1, 0.3), (5, 0.5), (8, 0.1), (8, 0.9)])
def test_law_of_the_counts(samples, p):
    """Chi-square over 2**18 draws at a false-positive rate of 1e-6; p off by 5 % (the negative control) fails."""
    n = 2**18
    observed = torch.bincount(counts(randfuse.key(11), (512, 512), samples, p).flatten(), minlength=samples + 1)

    def p_value(p):
        expected = torch.tensor([float(m) * n for m in law(samples, p)], dtype=torch.float64)
        few = expected < 5  # pooled with the largest cell
        pool = lambda t: torch.cat((t[~few], t[few].sum().reshape(1)))  # noqa: E731
        o, e = (pool(observed.double()), pool(expected)) if few.any() else (observed.double(), expected)
        chi2 = ((o - e).square() / e.clamp(min=1e-9)).sum()
        return float(torch.special.gammaincc(torch.tensor((len(o) - 1) / 2), chi2 / 2))

    assert p_value(p) > 1e-6, "counts must follow the Binomial law"
    assert p_value(p * 1.05) < 1e-6, "the test must see five percent"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("samples", [1, 8, 19])
def test_equals_the_reference(kernels_device, shape, dtype, samples):
    if dtype == torch.float64 and kernels_device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, key = torch.randn(shape).to(dtype).to(kernels_device), randfuse.key(3, kernels_device)
    for p in (0.0, 0.3, 0.97, 1.0):
        for place in ((0, 0), (5, 3), (2**32 - 100, 2**34 - 500)):
            for given in ((p, None), (0.0, torch.tensor(p, device=kernels_device))):
                y = call("multi_sample_scale", x, key, samples, *given, *place)
                assert_bitwise_equal(y, reference.multi_sample_scale(x, key, samples, *given, *place))


def test_strided_keyed_and_sliced(device):
    x, keys = torch.randn(40, 12, device=device).t(), randfuse.split(randfuse.key(1, device), 3)
    whole = call("multi_sample_scale", x, keys, 8, 0.4, None, 0, 0)
    assert whole.is_contiguous()
    for g in range(3):
        part = call("multi_sample_scale", x[4 * g : 4 * g + 4, 7:], keys[g], 8, 0.4, None, 0, 7)
        assert_bitwise_equal(part, whole[4 * g : 4 * g + 4, 7:])


def test_no_mask_keeps_a_nan(device):
    x, key = torch.full((20, 70), math.nan, device=device), randfuse.key(2, device)
    y = call("multi_sample_scale", x, key, 2, 0.6, None, 0, 0)
    assert_bitwise_equal(y.isnan(), counts(key, (20, 70), 2, 0.6) > 0)


@pytest.mark.parametrize("p", [0.001, 0.5, 0.999])
def test_the_mean_is_exact(device, p):
    """Five standard errors of 10⁶ draws (false alarm once in 2·10⁶); the variance is that of the docstring's p'."""
    y = call("multi_sample_scale", torch.ones(1000, 1000, device=device), randfuse.key(5, device), 8, p, None, 0, 0)
    effective = float(randfuse.effective_p(p))
    variance = effective / (1 - effective) / 8
    assert abs(float(y.double().mean()) - 1) < 5 * math.sqrt(variance) / 1000
    plain = F.dropout(torch.ones(1000, 1000, device=device), variance / (1 + variance)).double()
    assert abs(float(plain.mean()) - 1) < 5 * math.sqrt(variance) / 1000
    fourth = float((plain - 1).pow(4).mean()) / variance**2  # p' = 0.99 has long tails
    assert abs(float(plain.var()) / variance - 1) < 5 * math.sqrt((fourth - 1) / 1e6), "p' has this variance"
    kurtosis = 3 + (1 - 6 * effective * (1 - effective)) / (8 * effective * (1 - effective))
    assert abs(float(y.double().var()) / variance - 1) < 5 * math.sqrt((kurtosis - 1) / 1e6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mean_linear(device, dtype):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    operands = [make(4, 5, 70).requires_grad_(), make(6, 70).requires_grad_(), make(6).requires_grad_()]
    grad, key = make(4, 5, 6), randfuse.key(3, device)
    factor = counts(key, (20, 70), 8, 0.4).reshape(4, 5, 70).double() * streams.count_scale(
        streams.count_thresholds(streams.threshold(0.4), 8)
    )
    for p in (0.4, torch.tensor(0.4, device=device)):
        y = randfuse.multi_sample_linear(*operands, p, 8, reduce="mean", key=key)
        got = y, *torch.autograd.grad(y, operands, grad)

        def plain(cast):
            x, w, b = (cast(t.detach()).requires_grad_() for t in operands)
            y = F.linear((x * factor).to(x.dtype), w, b)
            return y, *torch.autograd.grad(y, (x, w, b), cast(grad))

        for name, a, e, s in zip(
            ("y", "dx", "dw", "db"), got, plain(torch.Tensor.double), plain(torch.clone), strict=True
        ):
            assert_close_to_float64(a, e, s, name=name, tiny=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("samples", [1, 5, 41, 49])  # in float32, 41 · (1 / 41) is not 1
def test_mean_of_none_dropped_and_of_all(device, samples):
    x, weight, key = torch.randn(9, 40, device=device), torch.randn(3, 40, device=device), randfuse.key(1, device)
    for p in (0.0, torch.tensor(0.0, device=device)):
        given = (0.5, p) if isinstance(p, torch.Tensor) else (p, None)
        assert_bitwise_equal(call("multi_sample_scale", x, key, samples, *given, 0, 0), x)
        y = randfuse.multi_sample_linear(x, weight, p=p, num_samples=samples, reduce="mean")
        assert_bitwise_equal(y, F.linear(x, weight))
    nothing = randfuse.multi_sample_linear(x, weight, p=1.0, num_samples=samples, reduce="mean")
    assert_bitwise_equal(nothing, torch.zeros(9, 3, device=device))


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 9), (4, 9), (4,)))
    run = lambda *a: randfuse.multi_sample_linear(*a, 0.4, 3, reduce="mean", key=randfuse.key(1))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, w, b))
    assert torch.autograd.gradgradcheck(run, (x, w, b))


@needs_extension
def test_nothing_of_the_size_of_x_is_saved():
    x, weight = torch.randn(64, 512, requires_grad=True), torch.randn(8, 512, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randfuse.multi_sample_linear(x, weight, p=0.1, reduce="mean")
    extra = [t for t in saved if t.data_ptr() not in {x.data_ptr(), weight.data_ptr()}]
    assert sum(t.numel() * t.element_size() for t in extra) <= 8, [t.shape for t in extra]


def test_the_reference_has_forward_derivatives():
    operands = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 7), (3, 7), (3,))]
    run = lambda *a: randfuse.multi_sample_linear(*a, 0.4, 3, reduce="mean", key=randfuse.key(1))  # noqa: E731
    with randfuse.use_backend("reference"):
        assert torch.autograd.gradcheck(run, operands, check_forward_ad=True)
