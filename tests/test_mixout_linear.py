"""mixout and mixout_linear: the formula, its gradients with the 1/(1 - p) of the paper, memory, autocast, errors."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _backends, _extension, use_backend
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64
from test_dropconnect_linear import DTYPES, OFFSETS, SHAPES, weight_mask

needs_extension = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))


@pytest.fixture
def device(device):
    if _backends._forced == "cuda":
        pytest.skip("the GPU kernels of weight masks are Triton's")
    return device


def operands(m, k, n, dtype, device):
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    return make(m, k), make(n, k), make(n, k), make(n), make(m, n)


def plain(x, weight, anchor, bias, mask, p, grad):
    """What PyTorch makes of a mask that it is given, in the dtype of x: y, dx, dw, da, db."""
    leaves = x, weight, anchor, bias = tuple(t.detach().clone().requires_grad_() for t in (x, weight, anchor, bias))
    scale = 0.0 if p == 1 else 1 / (1 - randfuse.effective_p(p))
    y = F.linear(x, anchor + torch.where(mask, (weight - anchor) * scale, 0), bias)
    return y, *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(device, shape, dtype, offsets):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, anchor, bias, grad = operands(*shape, dtype, device)
    place = dict(zip(("row_offset", "col_offset"), offsets, strict=True))
    key = randfuse.key(7, device)
    mask = weight_mask(weight.shape, 0.3, key, **place)
    leaves = [t.requires_grad_() for t in (x, weight, anchor, bias)]
    y = randfuse.mixout_linear(*leaves, 0.3, key=key, **place)
    got = y, *torch.autograd.grad(y, leaves, grad)
    exact = plain(*(t.double() for t in leaves), mask, 0.3, grad.double())
    same = plain(*leaves, mask, 0.3, grad)
    tiny = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14  # of a sum that PyTorch hits exactly
    for name, a, e, s in zip(("y", "dx", "dw", "da", "db"), got, exact, same, strict=True):
        assert_close_to_float64(a, e, s, name=name, tiny=tiny)
        assert a.is_contiguous(), name
    assert not got[2][~mask].any(), "a weight replaced by its anchor must get no gradient"


@pytest.mark.parametrize("shape", [(), (5,), (3, 64), (2, 9, 200), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_alone_equals_the_reference(device, dtype, shape):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    weight, anchor = (torch.randn(shape, dtype=torch.float64).to(dtype).to(device) for _ in range(2))
    key = randfuse.key(7, device)
    y = randfuse.mixout(weight, anchor, 0.3, key=key, col_offset=3)
    with use_backend("reference"):
        expected = randfuse.mixout(weight, anchor, 0.3, key=key, col_offset=3)
    assert_bitwise_equal(y, expected)


def test_gradient_has_the_factor_that_the_authors_program_lacks(device):
    """d/dW of A + D(W - A) is m/(1 - p); what D leaves of the gradient is the anchor's."""
    weight, anchor = (torch.randn(40, 70, device=device, requires_grad=True) for _ in range(2))
    key, p = randfuse.key(4, device), 0.75  # 1 - p is a power of two: every value below is exact
    dw, da = torch.autograd.grad(randfuse.mixout(weight, anchor, p, key=key).sum(), (weight, anchor))
    mask = weight_mask(weight.shape, p, key)
    assert_bitwise_equal(dw, torch.where(mask, 4.0, 0.0).to(device))
    assert_bitwise_equal(da, torch.where(mask, -3.0, 1.0).to(device))
    x = torch.ones(1, 70, device=device)
    (dw,) = torch.autograd.grad(randfuse.mixout_linear(x, weight, anchor.detach(), p=p, key=key).sum(), weight)
    assert_bitwise_equal(dw, torch.where(mask, 4.0, 0.0).to(device), name="of the linear layer")


@pytest.mark.parametrize("p", [0.1, 0.9, 0.999])
def test_mean_is_the_weight(device, p):
    """n = 2^20 elements: the mean of (mixed - anchor)/(weight - anchor) is 1 within 4 standard errors."""
    anchor = torch.zeros(1024, 1024, device=device)
    y = randfuse.mixout(anchor + 1, anchor, p, key=randfuse.key(21, device)).double()
    q = randfuse.effective_p(p)
    assert float(y.mean()) == pytest.approx(1, abs=4 * math.sqrt(q / (1 - q)) / 1024)


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0**-18])
def test_extremes_and_tensor_p(device, p):
    weight, anchor = (torch.randn(5, 70, device=device, requires_grad=True) for _ in range(2))
    key, same = randfuse.key(0, device), weight if p < 2**-17 else anchor
    for given in (p, torch.tensor(p, device=device)):
        y = randfuse.mixout(weight, anchor, given, key=key)
        assert_bitwise_equal(y, same, name=f"p = {given}")
        dw, da = torch.autograd.grad(y.sum(), (weight, anchor), allow_unused=True)
        assert_bitwise_equal(dw, torch.full_like(weight, float(same is weight)))
        assert da is None or torch.equal(da, torch.full_like(anchor, float(same is anchor))), "gradient of anchor"
    assert randfuse.mixout(weight, anchor, 0.5, training=False) is weight


def test_replaced_nan_does_not_spread(device):
    key, anchor = randfuse.key(2, device), torch.ones(8, 70, device=device)
    y = randfuse.mixout(torch.full_like(anchor, math.nan), anchor, key=key)
    mask = weight_mask(anchor.shape, 0.5, key)
    assert_bitwise_equal(y.isnan(), mask)
    assert_bitwise_equal(y[~mask], anchor[~mask])


def test_any_strides(device):
    key, base = randfuse.key(1, device), torch.randn(60, 60, device=device)
    y = randfuse.mixout(base.t()[:, 3:], base[:, :57], 0.4, key=key)
    assert_bitwise_equal(y, randfuse.mixout(base.t()[:, 3:].clone(), base[:, :57].clone(), 0.4, key=key))


def test_gradcheck_to_second_order(device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, anchor, bias, _ = (t.requires_grad_() for t in operands(3, 5, 4, torch.float64, device))
    key = randfuse.key(1)
    linear = lambda x, w, a, b: randfuse.mixout_linear(x, w, a, b, 0.4, key=key)  # noqa: E731
    alone = lambda w, a: randfuse.mixout(w, a, 0.4, key=key)  # noqa: E731
    for run, leaves in ((linear, (x, weight, anchor, bias)), (alone, (weight, anchor))):
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


@needs_extension  # the reference is PyTorch, which saves masks
def test_nothing_of_the_size_of_the_weight_is_saved():
    """Kept: x, weight, anchor and the key. The mixed weight is made again."""
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(96, 128, requires_grad=True)
    anchor, saved = weight.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randfuse.mixout_linear(x, weight, anchor, p=0.1)
        randfuse.mixout(weight, anchor, p=0.1)
    own = {t.data_ptr() for t in (x, weight, anchor)}
    extra = [t for t in saved if t.data_ptr() not in own]
    assert sum(t.numel() * t.element_size() for t in extra) <= 16, [t.shape for t in extra]


def test_autocast_mixes_before_it_rounds(device):
    """A fine-tuned weight differs from its anchor by less than bf16 sees; the difference must survive p = 0.999."""
    x, key = torch.eye(64, device=device), randfuse.key(3, device)
    anchor = torch.ones(64, 64, device=device)
    weight = (anchor + 2.0**-12).requires_grad_()
    mixed = randfuse.mixout(weight, anchor, 0.999, key=key).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        y = randfuse.mixout_linear(x, weight, anchor, None, 0.999, key=key)
    assert_bitwise_equal(y, mixed.t().contiguous())
    assert (y != 1).any(), "the difference is lost when each is rounded first"
    (dw,) = torch.autograd.grad(y.sum(), weight)
    assert dw.dtype == torch.float32
    assert_bitwise_equal(dw != 0, weight_mask(weight.shape, 0.999, key))


def test_eval_is_linear(device):
    x, weight, anchor, bias, _ = operands(4, 9, 3, torch.float32, device)
    y = randfuse.mixout_linear(x, weight, anchor, bias, 0.5, training=False)
    assert_bitwise_equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"x": torch.ones(4, 5, dtype=torch.bool)}, TypeError, "x must be float32.*, got torch.bool"),
    ({"weight": torch.ones(3, 6)}, ValueError, r"anchor_weight must have shape of weight = \(3, 6\), got \(3, 5\)"),
    ({"anchor_weight": torch.ones(5)}, ValueError, r"anchor_weight must have shape of weight = \(3, 5\), got \(5,\)"),
    ({"anchor_weight": None}, TypeError, "anchor_weight must be a Tensor, got NoneType"),
    ({"anchor_weight": torch.ones(3, 5).half()}, TypeError, "anchor_weight must be torch.float32, got torch.float16"),
    ({"x": torch.ones(4, 6)}, ValueError, r"weight must have shape \(N, K=6\), got \(3, 5\)"),
    ({"x": torch.ones(4, 5).half()}, TypeError, "weight must be torch.float16, got torch.float32"),
    ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(N,\) = \(3,\), got \(4,\)"),
    ({"p": 2}, ValueError, r"p must be in \[0, 1\], got 2"),
    ({"key": torch.zeros(2, dtype=torch.int64)}, ValueError, "key must have a length that divides the 3 rows, got 2"),
    ({"col_offset": -5}, ValueError, "col_offset must be in .*, got -5"),
])  # fmt: skip
def test_errors(device, kwargs, error, message):
    three = torch.ones(3, 5)
    arguments = {"x": torch.ones(4, 5), "weight": three, "anchor_weight": three, "key": randfuse.key(0)} | kwargs
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=f"^mixout_linear: {message}"):
        randfuse.mixout_linear(**arguments)
