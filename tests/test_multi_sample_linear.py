"""multi_sample_linear: equality with the loop over masks, derivatives of any order, memory, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _extension
from randfuse._backends import call
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

needs_extension = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (B, D, C, M): single element, ragged everything, one and several tiles, both sides of the narrow/wide border, empty.
SHAPES = [(1, 1, 1, 1), (3, 7, 5, 2), (17, 200, 16, 5), (33, 130, 33, 3), (40, 100, 100, 2), (5, 300, 129, 3)]
EMPTY = [(0, 5, 3, 2), (5, 0, 3, 2), (5, 3, 0, 2)]
OFFSETS = [(0, 0), (3, 5), (2**32 - 100, 2**35 - 5000)]


def operands(b, d, c, m, dtype, device, own=False):
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    weight, bias = (make(m, c, d), make(m, c)) if own else (make(c, d), make(c))
    return make(b, d), weight, bias, make(m, b, c)


def masks(x, samples, p, key, **place):
    return torch.stack([randfuse.dropout_mask(x.shape, p, key=key, sample=m, **place) for m in range(samples)])


def plain(x, weight, bias, kept, p, grad):
    """What a loop of PyTorch makes of masks that it is given, in the dtype of x: y, dx, dw, db."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    scale, each = 0.0 if p == 1 else 1 / (1 - randfuse.effective_p(p)), weight.dim() == 3
    y = torch.stack([
        F.linear(torch.where(mask, x * scale, 0), weight[m] if each else weight, bias[m] if each else bias)
        for m, mask in enumerate(kept)
    ])  # fmt: skip
    return y, *torch.autograd.grad(y, (x, weight, bias), grad)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "offsets"), [*zip(SHAPES + EMPTY, itertools.cycle(OFFSETS))])
def test_equals_the_loop_over_masks(device, shape, dtype, offsets, own):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, bias, grad = operands(*shape, dtype, device, own)
    place = dict(zip(("row_offset", "col_offset"), offsets, strict=True))
    key, samples = randfuse.key(7, device), shape[-1]
    kept = masks(x, samples, 0.3, key, **place)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = randfuse.multi_sample_linear(*leaves, 0.3, samples, key=key, **place)
    got = y, *torch.autograd.grad(y, leaves, grad)
    exact = plain(x.double(), weight.double(), bias.double(), kept, 0.3, grad.double())
    same = plain(x, weight, bias, kept, 0.3, grad)
    # A sum of few terms may come out exact in PyTorch: allow the rounding of one such sum beside it.
    tiny = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    for name, a, e, s in zip(("y", "dx", "dw", "db"), got, exact, same, strict=True):
        assert_close_to_float64(a, e, s, name=name, tiny=tiny)
    assert y.is_contiguous()


def test_masks_are_those_of_dropout_mask(device):
    """With an identity weight the product shows the masks; sample 0 is dropout_linear's."""
    for k in (64, 160):  # narrow and wide
        x, key = torch.randn(50, k, device=device), randfuse.key(3, device)
        y = randfuse.multi_sample_linear(x, torch.eye(k, device=device), p=0.4, num_samples=3, key=key)
        assert_bitwise_equal(y != 0, masks(x, 3, 0.4, key))
        torch.testing.assert_close(y[0], randfuse.dropout_linear(x, torch.eye(k, device=device), p=0.4, key=key))


@pytest.mark.parametrize("n", [8, 200])
def test_dropped_nan_and_inf_do_not_spread(device, n):
    x, key = torch.randn(40, 70, device=device), randfuse.key(2, device)
    dropped = ~masks(x, 2, 0.5, key).any(0)
    poisoned = torch.where(dropped, torch.where(x > 0, math.nan, math.inf), x)
    weight = torch.randn(n, 70, device=device)
    a, b = (randfuse.multi_sample_linear(t, weight, num_samples=2, key=key) for t in (poisoned, x))
    assert_bitwise_equal(a, b)


@pytest.mark.parametrize("n", [8, 200])
@pytest.mark.parametrize("p", [0.0, 1.0, 0.25])
def test_extremes_and_tensor_p(device, n, p):
    x, weight, bias, grad = operands(9, 70, n, 3, torch.float32, device)
    x.requires_grad_(), weight.requires_grad_()
    key = randfuse.key(0, device)
    for given in (p, torch.tensor(p, device=device)):
        y = randfuse.multi_sample_linear(x, weight, bias, given, 3, key=key)
        dx, dw = torch.autograd.grad(y, (x, weight), grad)
        expected = plain(x, weight, bias, masks(x, 3, p, key), p, grad)
        for a, e in zip((y, dx, dw), expected, strict=False):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    if p == 1:
        assert_bitwise_equal(y, bias.expand_as(y).contiguous())


@pytest.mark.parametrize("n", [8, 200])
def test_any_strides_leading_dims_and_keys(device, n):
    x, weight, keys = torch.randn(70, 3, 4, device=device), torch.randn(70, n, device=device), randfuse.split(
        randfuse.key(5, device), 3
    )  # fmt: skip
    turned = x.permute(1, 2, 0)  # (3, 4, 70), no stride is one in the last dim
    y = randfuse.multi_sample_linear(turned, weight.t(), num_samples=2, key=keys)
    assert y.shape == (2, 3, 4, n)
    for g in range(3):
        part = randfuse.multi_sample_linear(turned[g].contiguous(), weight.t().contiguous(), num_samples=2, key=keys[g])
        torch.testing.assert_close(y[:, g], part, rtol=1e-5, atol=1e-4)
    assert randfuse.multi_sample_linear(x[:, 0, 0], weight.t(), num_samples=2).shape == (2, n)
    rows = randfuse.multi_sample_linear(turned[0, 1:], weight.t(), num_samples=2, key=keys[0], row_offset=1)
    torch.testing.assert_close(rows, y[:, 0, 1:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_gradcheck_to_second_order(device, own):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, bias, _ = (t.requires_grad_() for t in operands(3, 5, 4, 2, torch.float64, device, own))
    run = lambda x, w, b: randfuse.multi_sample_linear(x, w, b, 0.4, 2, key=randfuse.key(1))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["multi_sample_linear_dgrad", "multi_sample_linear_wgrad"])
def test_gradcheck_of_the_gradients(device, name, own):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, _, grad = (t.requires_grad_() for t in operands(3, 5, 4, 2, torch.float64, device, own))
    operand, extra = (weight, ()) if name.endswith("dgrad") else (x, (not own,))
    run = lambda a, b: call(name, a, b, *extra, randfuse.key(1), 0.4, None, 0, 0)  # noqa: E731
    assert torch.autograd.gradcheck(run, (grad, operand))
    assert torch.autograd.gradgradcheck(run, (grad, operand))


@needs_extension  # the reference is PyTorch, which saves masks
@pytest.mark.parametrize("n", [8, 512])
def test_nothing_of_the_size_of_x_is_saved(n):
    x, weight = torch.randn(64, 512, requires_grad=True), torch.randn(n, 512, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randfuse.multi_sample_linear(x, weight, p=0.1)
    extra = [t for t in saved if t.data_ptr() not in {x.data_ptr(), weight.data_ptr()}]
    assert sum(t.numel() * t.element_size() for t in extra) <= 8, [t.shape for t in extra]


@needs_extension
def test_threads_never_change_a_bit():
    x, weight, _, grad = operands(100, 300, 16, 3, torch.float32, "cpu")
    key, before, results = randfuse.key(1), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = randfuse.multi_sample_linear(x, weight, num_samples=3, key=key)
            dx = call("multi_sample_linear_dgrad", grad, weight, key, 0.5, None, 0, 0)
            dw = call("multi_sample_linear_wgrad", grad, x, True, key, 0.5, None, 0, 0)
            results.append((y, dx, dw))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "x must be float32.*, got torch.int64"),
    ({"weight": torch.ones(3, 6)}, ValueError, r"weight must have shape \(N, K=5\), got \(3, 6\)"),
    ({"weight": torch.ones(3, 2, 5)}, ValueError, r"weight must have shape \(M, N, K\) = \(2, 2, 5\), got \(3, 2, 5\)"),
    ({"weight": torch.ones(2, 3, 5), "bias": torch.ones(3)}, ValueError, r"bias must have shape \(M, N\) = \(2, 3\)"),
    ({"weight": torch.ones(2, 3, 5), "reduce": "mean"}, ValueError, r"weight must have shape \(N, K=5\)"),
    ({"weight": torch.ones(3, 5).half()}, TypeError, "weight must be torch.float32, got torch.float16"),
    ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(N,\) = \(3,\), got \(4,\)"),
    ({"p": 2}, ValueError, r"p must be in \[0, 1\], got 2"),
    ({"num_samples": 0}, ValueError, r"num_samples must be in \[1, 4294967295\], got 0"),
    ({"num_samples": 2.0}, TypeError, "num_samples must be an int, got float"),
    ({"num_samples": 129, "reduce": "mean"}, ValueError, r"num_samples must be in \[1, 128\], got 129"),
    ({"reduce": "sum"}, ValueError, "reduce must be 'none' or 'mean', got 'sum'"),
    ({"reduce": "mean", "col_offset": 2**34}, ValueError, r"col_offset must be in \[0, 2\*\*34 - cols\]"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
    ({"row_offset": -5}, ValueError, "row_offset must be in .*, got -5"),
])  # fmt: skip
def test_errors(device, kwargs, error, message):
    arguments = {"x": torch.ones(4, 5), "weight": torch.ones(3, 5), "num_samples": 2, "key": randfuse.key(0)} | kwargs
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=f"^multi_sample_linear: {message}"):
        randfuse.multi_sample_linear(**arguments)


def test_autocast(device):
    x, weight, bias, _ = operands(6, 40, 5, 2, torch.float32, device)
    key = randfuse.key(3, device)
    for reduce in ("none", "mean"):
        with torch.autocast(device, torch.bfloat16):
            y = randfuse.multi_sample_linear(x, weight, bias, 0.3, 2, reduce=reduce, key=key)
        low = (t.bfloat16() for t in (x, weight, bias))
        assert_bitwise_equal(y, randfuse.multi_sample_linear(*low, 0.3, 2, reduce=reduce, key=key))
