"""dropout_linear: equality with F.linear of a dropped input, derivatives of any order, memory, errors."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _extension, use_backend
from randfuse._backends import call
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

needs_extension = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (M, K, N): single element, ragged everything, one and several tiles, both sides of the narrow/wide border, empty.
SHAPES = [(1, 1, 1), (3, 7, 5), (17, 200, 16), (33, 130, 33), (20, 64, 64), (40, 100, 100), (5, 300, 129)]
EMPTY = [(0, 5, 3), (5, 0, 3), (5, 3, 0)]
# Several row tiles and splits of the GPU kernels.
LARGE = [pytest.param(s, marks=pytest.mark.gpu) for s in ((1100, 1104, 128), (1100, 1104, 16), (700, 1100, 40))]
OFFSETS = [(0, 0), (3, 5), (2**32 - 100, 2**35 - 5000)]


def operands(m, k, n, dtype, device):
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    return make(m, k), make(n, k), make(n), make(m, n)


def plain(x, weight, bias, mask, p, grad):
    """What PyTorch makes of a mask that it is given, in the dtype of x: y, dx, dw, db."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    scale = 0.0 if p == 1 else 1 / (1 - randfuse.effective_p(p))
    y = F.linear(torch.where(mask, x * scale, 0), weight, bias)
    return y, *torch.autograd.grad(y, (x, weight, bias), grad)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY + LARGE)
def test_forward_and_gradients(device, shape, dtype, offsets):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, bias, grad = operands(*shape, dtype, device)
    place = dict(zip(("row_offset", "col_offset"), offsets, strict=True))
    key = randfuse.key(7, device)
    mask = randfuse.dropout_mask(x.shape, 0.3, key=key, **place)
    for t in (x, weight, bias):
        t.requires_grad_()
    y = randfuse.dropout_linear(x, weight, bias, 0.3, key=key, **place)
    got = y, *torch.autograd.grad(y, (x, weight, bias), grad)
    exact = plain(x.double(), weight.double(), bias.double(), mask, 0.3, grad.double())
    same = plain(x, weight, bias, mask, 0.3, grad)
    # A sum of few terms may come out exact in PyTorch: allow the rounding of one such sum beside it.
    tiny = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    for name, a, e, s in zip(("y", "dx", "dw", "db"), got, exact, same, strict=True):
        assert_close_to_float64(a, e, s, name=name, tiny=tiny)
        assert a.is_contiguous(), name
    assert torch.equal(got[1] != 0, mask & (got[1] != 0)), "the gradient is zero where x was dropped"


def test_mask_is_that_of_dropout_mask(device):
    """With an identity weight the product shows the mask itself."""
    for k in (64, 160):  # narrow and wide
        x, key = torch.randn(50, k, device=device), randfuse.key(3, device)
        y = randfuse.dropout_linear(x, torch.eye(k, device=device), p=0.4, key=key)
        assert_bitwise_equal(y != 0, randfuse.dropout_mask(x.shape, 0.4, key=key))


@pytest.mark.parametrize("n", [8, 200])
def test_dropped_nan_and_inf_do_not_spread(device, n):
    x, key = torch.randn(40, 70, device=device), randfuse.key(2, device)
    mask = randfuse.dropout_mask(x.shape, 0.5, key=key)
    poisoned = torch.where(mask, x, torch.where(x > 0, math.nan, math.inf))
    weight = torch.randn(n, 70, device=device)
    assert_bitwise_equal(
        randfuse.dropout_linear(poisoned, weight, key=key), randfuse.dropout_linear(x, weight, key=key)
    )


@pytest.mark.parametrize("n", [8, 200])
@pytest.mark.parametrize("p", [0.0, 1.0, 0.25])
def test_extremes_and_tensor_p(device, n, p):
    x, weight, bias, grad = operands(9, 70, n, torch.float32, device)
    x.requires_grad_(), weight.requires_grad_()
    key = randfuse.key(0, device)
    for given in (p, torch.tensor(p, device=device)):
        y = randfuse.dropout_linear(x, weight, bias, given, key=key)
        dx, dw = torch.autograd.grad(y, (x, weight), grad)
        expected = plain(x, weight, bias, randfuse.dropout_mask(x.shape, p, key=key), p, grad)
        for a, e in zip((y, dx, dw), expected, strict=False):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    if p == 1:
        assert_bitwise_equal(y, bias.expand_as(y).contiguous())


@pytest.mark.parametrize("n", [8, 200])
def test_any_strides_and_leading_dims(device, n):
    x, weight, key = torch.randn(70, 3, 10, device=device), torch.randn(70, n, device=device), randfuse.key(4, device)
    turned = x.permute(1, 2, 0)  # (3, 10, 70), no stride is one in the last dim
    torch.testing.assert_close(  # another layout of the weight may be another kernel of the library
        randfuse.dropout_linear(turned, weight.t(), key=key),
        randfuse.dropout_linear(turned.contiguous(), weight.t().contiguous(), key=key),
        rtol=1e-5,
        atol=1e-4,
    )
    rows = torch.randn(12, 140, device=device)[::2, :70]
    assert_bitwise_equal(
        randfuse.dropout_linear(rows, weight.t(), key=key), randfuse.dropout_linear(rows.clone(), weight.t(), key=key)
    )
    assert randfuse.dropout_linear(x[:, 0, 0], weight.t(), key=key).shape == (n,)


@pytest.mark.parametrize("n", [8, 200])
def test_keys_and_slices(device, n):
    x, weight = torch.randn(12, 200, device=device), torch.randn(n, 200, device=device)
    keys = randfuse.split(randfuse.key(5, device), 3)
    y = randfuse.dropout_linear(x, weight, key=keys)
    for g in range(3):
        part = randfuse.dropout_linear(x[4 * g : 4 * g + 4], weight, key=keys[g])
        torch.testing.assert_close(y[4 * g : 4 * g + 4], part, rtol=1e-5, atol=1e-4)
    # Tensor parallel: shards of K add up to the whole; data parallel: shards of rows are its rows.
    whole = randfuse.dropout_linear(x, weight, key=keys[0])
    cut = 77
    left = randfuse.dropout_linear(x[:, :cut], weight[:, :cut], key=keys[0])
    right = randfuse.dropout_linear(x[:, cut:], weight[:, cut:], key=keys[0], col_offset=cut)
    torch.testing.assert_close(left + right, whole, rtol=1e-4, atol=1e-4)
    rows = randfuse.dropout_linear(x[5:], weight, key=keys[0], row_offset=5)
    torch.testing.assert_close(rows, whole[5:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [3, 80])
def test_gradcheck_to_second_order(device, n):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, bias, _ = (t.requires_grad_() for t in operands(3, 9, n, torch.float64, device))
    run = lambda x, w, b: randfuse.dropout_linear(x, w, b, 0.4, key=randfuse.key(1))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("name", ["dropout_linear_dgrad", "dropout_linear_wgrad"])
def test_gradcheck_of_the_gradients(device, name):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, _, grad = (t.requires_grad_() for t in operands(3, 9, 4, torch.float64, device))
    operand = weight if name.endswith("dgrad") else x
    run = lambda a, b: call(name, a, b, randfuse.key(1), 0.4, None, 0, 0)  # noqa: E731
    assert torch.autograd.gradcheck(run, (grad, operand))
    assert torch.autograd.gradgradcheck(run, (grad, operand))


@needs_extension  # the reference is PyTorch, which saves masks
@pytest.mark.parametrize("n", [8, 512])
def test_nothing_of_the_size_of_x_is_saved(n):
    """A training step keeps x, the weight and the key: no mask, no dropped copy."""
    x, weight = torch.randn(256, 512, requires_grad=True), torch.randn(n, 512, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randfuse.dropout_linear(x, weight, p=0.1)
    own = {t.data_ptr() for t in (x, weight)}
    extra = [t for t in saved if t.data_ptr() not in own]
    assert sum(t.numel() * t.element_size() for t in extra) <= 8, [t.shape for t in extra]


@needs_extension
def test_a_frozen_weight_does_not_keep_x_alive():
    """As in F.linear: where only dx is wanted, only the weight is kept."""
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(200, 256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randfuse.dropout_linear(x, weight, p=0.1)
        randfuse.linear_dropout(x, weight, p=0.1)
    assert not any(t.data_ptr() == x.data_ptr() for t in saved)


@needs_extension
def test_forward_mode_is_refused_not_forgotten():
    from torch.autograd import forward_ad

    x, weight, _, _ = operands(3, 9, 4, torch.float32, "cpu")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="^dropout_linear: forward-mode derivatives must be taken under"):
            randfuse.dropout_linear(dual, weight)
        with use_backend("reference"):
            assert forward_ad.unpack_dual(randfuse.dropout_linear(dual, weight)).tangent is not None


@needs_extension
def test_threads_never_change_a_bit():
    x, weight, _, grad = operands(100, 300, 16, torch.float32, "cpu")
    key, before, results = randfuse.key(1), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = randfuse.dropout_linear(x, weight, key=key)
            dx = call("dropout_linear_dgrad", grad, weight, key, 0.5, None, 0, 0)
            dw = call("dropout_linear_wgrad", grad, x, key, 0.5, None, 0, 0)
            results.append((y, dx, dw))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)


def test_eval_is_linear(device):
    x, weight, bias, _ = operands(4, 9, 3, torch.float32, device)
    assert_bitwise_equal(randfuse.dropout_linear(x, weight, bias, 0.5, training=False), F.linear(x, weight, bias))


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "x must be float32.*, got torch.int64"),
    ({"x": torch.ones(())}, ValueError, "x must have at least one dimension, got 0"),
    ({"weight": torch.ones(3, 6)}, ValueError, r"weight must have shape \(N, K=5\), got \(3, 6\)"),
    ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \(N, K=5\), got \(5,\)"),
    ({"weight": torch.ones(3, 5).half()}, TypeError, "weight must be torch.float32, got torch.float16"),
    ({"weight": torch.ones(3, 5, device="meta")}, ValueError, "weight must be on .*, got meta"),
    ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(N,\) = \(3,\), got \(4,\)"),
    ({"bias": torch.ones(3).bfloat16()}, TypeError, "bias must be torch.float32, got torch.bfloat16"),
    ({"p": 2}, ValueError, r"p must be in \[0, 1\], got 2"),
    ({"granularity": "row"}, ValueError, "granularity must be 'element', 'column' or 'block', got 'row'"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
    ({"row_offset": -5}, ValueError, "row_offset must be in .*, got -5"),
])  # fmt: skip
def test_errors(device, kwargs, error, message):
    arguments = {"x": torch.ones(4, 5), "weight": torch.ones(3, 5), "key": randfuse.key(0)} | kwargs
    arguments = {
        k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v for k, v in arguments.items()
    }
    with pytest.raises(error, match=f"^dropout_linear: {message}"):
        randfuse.dropout_linear(**arguments)


def test_forced_backend_refuses_other_devices():
    x = torch.ones(4, 5, device="meta")
    with use_backend("cpu"), pytest.raises(ValueError, match="^dropout_linear: backend 'cpu' must be given tensors"):
        randfuse.dropout_linear(
            x, torch.ones(3, 5, device="meta"), key=torch.zeros((), dtype=torch.int64, device="meta")
        )


def test_autocast(device):
    x, weight, bias, _ = operands(6, 40, 5, torch.float32, device)
    key = randfuse.key(3, device)
    with torch.autocast(device, torch.bfloat16):
        y = randfuse.dropout_linear(x, weight, bias, 0.3, key=key)
    assert y.dtype == torch.bfloat16
    low = (t.bfloat16() for t in (x, weight, bias))
    assert_bitwise_equal(y, randfuse.dropout_linear(*low, 0.3, key=key))
