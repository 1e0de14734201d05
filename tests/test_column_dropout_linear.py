"""dropout_linear(granularity="column"): equality with a masked product, exact k and scale, derivatives, errors."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _backends
from randfuse.ops.column_dropout_linear import kept_columns
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(1, 1, 1), (3, 7, 5), (33, 130, 33), (5, 300, 129), (0, 5, 3), (5, 0, 3), (5, 3, 0)]


@pytest.fixture
def device(device):
    if _backends._forced == "cuda":
        pytest.skip("no CUDA kernel, by design")
    return device


def operands(m, k, n, dtype, device):
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    return make(m, k), make(n, k), make(n), make(m, n)


def run(x, weight, bias=None, p=0.5, **kwargs):
    return randfuse.dropout_linear(x, weight, bias, p, granularity="column", **kwargs)


def factor(k, p, key):
    """What each column is multiplied by, shown by an identity weight."""
    return run(torch.ones(1, k, device=key.device), torch.eye(k, device=key.device), p=p, key=key)[0].double()


def plain(x, weight, bias, scales, grad):
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    wide = x if x.dtype == torch.float64 else x.float()
    y = F.linear((wide * scales.to(wide.dtype)).to(x.dtype), weight, bias)
    return y, *torch.autograd.grad(y, (x, weight, bias), grad)


@pytest.mark.parametrize("p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(device, shape, dtype, p):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, bias, grad = operands(*shape, dtype, device)
    key, k = randfuse.key(7, device), kept_columns(p, shape[1])
    scales = (factor(shape[1], p, key) != 0).double() * (shape[1] / max(k, 1))
    for t in (x, weight, bias):
        t.requires_grad_()
    y = run(x, weight, bias, p, key=key)
    got = y, *torch.autograd.grad(y, (x, weight, bias), grad)
    exact = plain(x.double(), weight.double(), bias.double(), scales, grad.double())
    same = plain(x, weight, bias, scales, grad)
    tiny = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    for name, a, e, s in zip(("y", "dx", "dw", "db"), got, exact, same, strict=True):
        assert_close_to_float64(a, e, s, name=name, tiny=tiny)


@pytest.mark.parametrize(("k", "p", "kept"), [(4096, 0.9, 410), (10, 0.9, 1), (4, 0.9, 1), (4, 1.0, 0), (4, 0.001, 4)])
def test_exactly_k_columns_and_their_scale(device, k, p, kept):
    scales = factor(k, p, randfuse.key(3, device))
    assert int((scales != 0).sum()) == kept
    if kept:
        assert float(scales.max()) == pytest.approx(k / kept, rel=1e-7), "the scale is K/k, of the effective p"


def test_every_column_is_kept_alike(device):
    """20000 keys, 3 of 10: each count within 5 standard errors of 6000 (false alarm 6·10⁻⁶ in all)."""
    eye = torch.eye(10, device=device)
    keys = torch.arange(20_000, device=device)
    masks = torch.vmap(lambda key: run(torch.ones(1, 10, device=device), eye, p=0.7, key=key))(keys)
    counts = (masks != 0).sum((0, 1)).double()
    assert float((counts - 6000).abs().max()) < 5 * (20_000 * 0.3 * 0.7) ** 0.5


def test_all_rows_share_the_columns(device):
    x, weight, key = torch.randn(2, 5, 40, device=device), torch.randn(7, 40, device=device), randfuse.key(1, device)
    whole = run(x, weight, key=key)
    torch.testing.assert_close(run(x[1, 2:], weight, key=key, row_offset=7), whole[1, 2:])
    assert run(x[0, 0], weight, key=key).shape == (7,)


def test_dropped_nan_and_inf_do_not_spread(device):
    key = randfuse.key(2, device)
    kept = factor(70, 0.5, key) != 0
    x, weight = torch.randn(9, 70, device=device), torch.randn(8, 70, device=device)
    poisoned = torch.where(kept, x, torch.where(x > 0, math.nan, math.inf))
    assert_bitwise_equal(run(poisoned, weight, key=key), run(x, weight, key=key))


def test_p_zero_and_eval_are_linear(device):
    x, weight, bias, _ = operands(4, 70, 3, torch.float32, device)
    assert_bitwise_equal(run(x, weight, bias, 0), F.linear(x, weight, bias))
    assert_bitwise_equal(run(x, weight, bias, 0.5, training=False), F.linear(x, weight, bias))


def test_gradcheck_to_second_order(device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, bias, _ = (t.requires_grad_() for t in operands(3, 9, 4, torch.float64, device))
    function = lambda x, w, b: run(x, w, b, 0.4, key=randfuse.key(1))  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


def test_what_backward_keeps():
    """The kept columns of x and weight: at p = 0.9 a tenth of them."""
    x, weight = torch.randn(64, 400, requires_grad=True), torch.randn(32, 400, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(x, weight, p=0.9)
    assert sum(t.numel() for t in saved if t.is_floating_point()) <= 40 * (64 + 32), [t.shape for t in saved]


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"p": torch.tensor(0.5)}, TypeError, "p must be a float for granularity 'column', whose sizes it sets"),
    ({"col_offset": 64}, ValueError, "col_offset must be 0 for granularity 'column', got 64"),
    ({"key": torch.zeros(2, dtype=torch.int64)}, ValueError,
     r"key must have shape \(\) for granularity 'column' \(or use vmap\), got \(2,\)"),
])  # fmt: skip
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=f"^dropout_linear: {message}"):
        run(torch.ones(4, 70), torch.ones(3, 70), **({"key": randfuse.key(0)} | kwargs))
