"""dropconnect_linear and dropconnect: the stream of weights, equality with F.linear, derivatives, memory, errors."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _backends, _extension, use_backend
from randfuse.reference import streams
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

needs_extension = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(1, 1, 1), (3, 7, 5), (17, 200, 16), (33, 130, 140), (0, 5, 3), (5, 0, 3), (5, 3, 0)]  # M, K, N
OFFSETS = [(0, 0), (3, 5), (2**32 - 200, 2**35 - 5000)]


@pytest.fixture
def device(device):
    if _backends._forced == "cuda":
        pytest.skip("the GPU kernels of weight masks are Triton's")
    return device


def operands(m, k, n, dtype, device):
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    return make(m, k), make(n, k), make(n), make(m, n)


def weight_mask(shape, p, key, row_offset=0, col_offset=0):
    """The mask of a weight, from the specification of the streams alone."""
    rows = torch.arange(row_offset, row_offset + shape[0])
    cols = torch.arange(col_offset, col_offset + shape[1])
    lanes = streams.lanes(key.cpu().expand(shape[0]), rows, cols, op=3, width=16, rounds=7)
    return (lanes >= round(p * 65536)).to(key.device)


def plain(x, weight, bias, mask, p, grad):
    """What PyTorch makes of a mask that it is given, in the dtype of x: y, dx, dw, db."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    scale = 0.0 if p == 1 else 1 / (1 - randfuse.effective_p(p))
    y = F.linear(x, torch.where(mask, weight * scale, 0), bias)
    return y, *torch.autograd.grad(y, (x, weight, bias), grad)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(device, shape, dtype, offsets):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, bias, grad = operands(*shape, dtype, device)
    place = dict(zip(("row_offset", "col_offset"), offsets, strict=True))
    key = randfuse.key(7, device)
    mask = weight_mask(weight.shape, 0.3, key, **place)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = randfuse.dropconnect_linear(*leaves, 0.3, key=key, **place)
    got = y, *torch.autograd.grad(y, leaves, grad)
    exact = plain(x.double(), weight.double(), bias.double(), mask, 0.3, grad.double())
    same = plain(x, weight, bias, mask, 0.3, grad)
    tiny = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14  # of a sum that PyTorch hits exactly
    for name, a, e, s in zip(("y", "dx", "dw", "db"), got, exact, same, strict=True):
        assert_close_to_float64(a, e, s, name=name, tiny=tiny)
        assert a.is_contiguous(), name
    assert not got[2][~mask].any(), "the gradient of a dropped weight must be 0"


def test_mask_is_the_stream_of_weights(device):
    """And not that of inputs: under one key the two agree as often as independent coins, 2^16 of them, ± 4 sigma."""
    key, ones = randfuse.key(3, device), torch.ones(256, 256, device=device)
    kept = randfuse.dropconnect(ones, 0.4, key=key) != 0
    assert_bitwise_equal(kept, weight_mask((256, 256), 0.4, key))
    agree = float((kept == randfuse.dropout_mask((256, 256), 0.4, key=key)).double().mean())
    assert agree == pytest.approx(0.52, abs=4 * math.sqrt(0.52 * 0.48) / 256), "streams of inputs and weights are two"


@pytest.mark.parametrize("p", [0.0, 1.0, 0.25])
def test_extremes_and_tensor_p(device, p):
    x, weight, bias, grad = operands(9, 70, 20, torch.float32, device)
    leaves, key = [t.requires_grad_() for t in (x, weight)], randfuse.key(0, device)
    expected = plain(x, weight, bias, weight_mask(weight.shape, p, key), p, grad)
    for given in (p, torch.tensor(p, device=device)):
        y = randfuse.dropconnect_linear(*leaves, bias, given, key=key)
        for a, e in zip((y, *torch.autograd.grad(y, leaves, grad)), expected, strict=False):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    if p == 1:
        assert_bitwise_equal(y, bias.expand_as(y).contiguous())
    if p == 0:
        assert randfuse.dropconnect(weight, 0.0) is weight


def test_dropped_nan_does_not_spread(device):
    key, x = randfuse.key(2, device), torch.randn(4, 70, device=device)
    weight = torch.randn(20, 70, device=device)
    poisoned = torch.where(weight_mask(weight.shape, 0.5, key), weight, math.nan)
    assert_bitwise_equal(
        randfuse.dropconnect_linear(x, poisoned, key=key), randfuse.dropconnect_linear(x, weight, key=key)
    )


def test_shards_and_keys(device):
    """Tensor parallel over either side, any strides, and a key for each run of output features."""
    x, weight = torch.randn(3, 4, 90, device=device), torch.randn(90, 12, device=device).t()
    key = randfuse.key(5, device)
    whole = randfuse.dropconnect_linear(x, weight, key=key)
    rows = randfuse.dropconnect_linear(x, weight[5:], key=key, row_offset=5)
    torch.testing.assert_close(rows, whole[..., 5:], rtol=1e-5, atol=1e-4)
    left = randfuse.dropconnect_linear(x[..., :77], weight[:, :77], key=key)
    right = randfuse.dropconnect_linear(x[..., 77:], weight[:, 77:], key=key, col_offset=77)
    torch.testing.assert_close(left + right, whole, rtol=1e-4, atol=1e-4)
    keys = randfuse.split(key, 3)
    y = randfuse.dropconnect_linear(x, weight, key=keys)
    for g in range(3):
        part = randfuse.dropconnect_linear(x, weight[4 * g : 4 * g + 4], key=keys[g])
        torch.testing.assert_close(y[..., 4 * g : 4 * g + 4], part, rtol=1e-5, atol=1e-4)


def test_gradcheck_to_second_order(device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    leaves = [t.requires_grad_() for t in operands(3, 5, 4, torch.float64, device)[:3]]
    run = lambda x, w, b: randfuse.dropconnect_linear(x, w, b, 0.4, key=randfuse.key(1))  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@needs_extension  # the reference is PyTorch, which saves masks
def test_nothing_of_the_size_of_the_weight_is_saved():
    """Kept: x, the raw weight and the key; of a frozen weight not even x."""
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(96, 128, requires_grad=True)
    for frozen in (False, True):
        weight.requires_grad_(not frozen)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            randfuse.dropconnect_linear(x, weight, p=0.1)
        own = {weight.data_ptr()} if frozen else {x.data_ptr(), weight.data_ptr()}
        extra = [t for t in saved if t.data_ptr() not in own]
        assert sum(t.numel() * t.element_size() for t in extra) <= 8, [t.shape for t in extra]


def test_eval_and_autocast(device):
    x, weight, bias, _ = operands(6, 40, 5, torch.float32, device)
    assert_bitwise_equal(randfuse.dropconnect_linear(x, weight, bias, 0.5, training=False), F.linear(x, weight, bias))
    key = randfuse.key(3, device)
    with torch.autocast(device, torch.bfloat16):
        y = randfuse.dropconnect_linear(x, weight, bias, 0.3, key=key)
    low = (t.bfloat16() for t in (x, weight, bias))
    assert_bitwise_equal(y, randfuse.dropconnect_linear(*low, 0.3, key=key))


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "x must be float32.*, got torch.int64"),
    ({"x": torch.ones(())}, ValueError, "x must have at least one dimension, got 0"),
    ({"weight": torch.ones(3, 6)}, ValueError, r"weight must have shape \(N, K=5\), got \(3, 6\)"),
    ({"weight": torch.ones(3, 5).half()}, TypeError, "weight must be torch.float32, got torch.float16"),
    ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(N,\) = \(3,\), got \(4,\)"),
    ({"p": 2}, ValueError, r"p must be in \[0, 1\], got 2"),
    ({"key": torch.zeros(2, dtype=torch.int64)}, ValueError, "key must have a length that divides the 3 rows, got 2"),
    ({"row_offset": -5}, ValueError, "row_offset must be in .*, got -5"),
    ({"generator": 3, "key": None}, TypeError, "generator must be a torch.Generator, got int"),
])  # fmt: skip
def test_errors(device, kwargs, error, message):
    arguments = {"x": torch.ones(4, 5), "weight": torch.ones(3, 5), "key": randfuse.key(0)} | kwargs
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=f"^dropconnect_linear: {message}"):
        randfuse.dropconnect_linear(**arguments)


def test_errors_of_the_weight_alone():
    with pytest.raises(TypeError, match="^dropconnect: weight must be a Tensor, got list"):
        randfuse.dropconnect([1.0])
    with pytest.raises(ValueError, match=r"^dropconnect: p must be in \[0, 1\], got -1"):
        randfuse.dropconnect(torch.ones(2, 2), -1)


@pytest.mark.gpu
def test_the_cuda_backend_says_who_has_the_kernels():
    x = torch.ones(4, 5, device="cuda")
    with use_backend("cuda"), pytest.raises(ValueError, match="^dropconnect_linear: backend must be 'triton' or"):
        randfuse.dropconnect_linear(x, x)
