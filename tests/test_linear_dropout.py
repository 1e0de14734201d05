"""linear_dropout: the epilogue on every backend against plain PyTorch, its derivatives, memory, errors."""

from __future__ import annotations

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _extension
from randfuse._backends import call
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ACTIVATIONS = [None, "relu", "gelu", "silu"]
ACT = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
SHAPES = [(1, 1, 1), (3, 7, 5), (17, 20, 200), (9, 33, 64), (0, 5, 3), (5, 3, 0)]


def operands(m, k, n, dtype, device):
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    return make(m, k), make(n, k), make(n), make(m, n), make(m, n)


def output_mask(shape, p, key, device, **place):
    """The mask of the output stream, seen through an epilogue of ones."""
    ones = torch.ones(shape, device=device)
    y = call("act_dropout", ones, None, "none", key, p, None, place.get("row_offset", 0), place.get("col_offset", 0))
    return y != 0


def plain(x, weight, bias, residual, activation, mask, p, grad):
    leaves = tuple(t.detach().clone().requires_grad_() for t in (x, weight, bias, residual))
    scale = 0.0 if p == 1 else 1 / (1 - randfuse.effective_p(p))
    y = leaves[3] + torch.where(mask, ACT[activation](F.linear(*leaves[:3])) * scale, 0)
    return y, *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(device, shape, dtype, activation):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    *tensors, grad = operands(*shape, dtype, device)
    key, place = randfuse.key(7, device), {"row_offset": 3, "col_offset": 5}
    mask = output_mask(grad.shape, 0.3, key, device, **place)
    leaves = [t.requires_grad_() for t in tensors]
    y = randfuse.linear_dropout(*leaves[:3], 0.3, activation=activation, residual=leaves[3], key=key, **place)
    got = y, *torch.autograd.grad(y, leaves, grad)
    exact = plain(*(t.double() for t in tensors), activation, mask, 0.3, grad.double())
    same = plain(*tensors, activation, mask, 0.3, grad)
    tiny = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    for name, a, e, s in zip(("y", "dx", "dw", "db", "dr"), got, exact, same, strict=True):
        assert_close_to_float64(a, e, s, name=name, tiny=tiny)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 1.0, 0.25])
def test_extremes_and_tensor_p(device, p, activation):
    x, weight, bias, residual, _ = operands(5, 9, 70, torch.float32, device)
    key = randfuse.key(0, device)
    mask = output_mask(residual.shape, p, key, device)
    scale = 0.0 if p == 1 else 1 / (1 - p)
    expected = residual + torch.where(mask, ACT[activation](F.linear(x, weight, bias)) * scale, 0)
    for given in (p, torch.tensor(p, device=device)):
        y = randfuse.linear_dropout(x, weight, bias, given, activation=activation, residual=residual, key=key)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_mask_equals_on_all_backends(kernels_device):
    device = kernels_device
    key = randfuse.key(3, device)
    mask = output_mask((50, 300), 0.4, key, device, col_offset=11)
    with randfuse.use_backend("reference"):
        expected = output_mask((50, 300), 0.4, key, device, col_offset=11)
    assert_bitwise_equal(mask, expected)


def test_dropped_nan_does_not_spread(device):
    key = randfuse.key(2, device)
    x, weight = torch.full((4, 1), float("nan"), device=device), torch.ones(70, 1, device=device)
    y = randfuse.linear_dropout(x, weight, key=key)
    mask = output_mask((4, 70), 0.5, key, device)
    assert_bitwise_equal(y.isnan(), mask)
    assert not y[~mask].any()


def test_relu_gradient_selects(device):
    """As in PyTorch: nothing passes where z <= 0, not even inf; a NaN z lets the gradient through."""
    z = torch.tensor([[float("nan"), -1.0, 1.0, 0.0] * 16], device=device)
    grad = torch.full_like(z, float("inf"))
    dz = call("act_dropout_grad", grad, z, "relu", randfuse.key(2, device), 0.0, None, 0, 0)
    assert_bitwise_equal(dz, torch.where(z <= 0, 0, grad))


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
def test_a_gradient_without_the_pre_activation_is_refused():
    x, weight = torch.randn(4, 9, requires_grad=True), torch.randn(5, 9)
    y, _ = call("linear_dropout", x, weight, None, None, "gelu", False, randfuse.key(1), 0.5, None, 0, 0)
    with pytest.raises(RuntimeError, match="^linear_dropout: save_preact must be True where a gradient is wanted"):
        y.sum().backward()


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_gradient_is_zero_where_an_infinite_activation_was_dropped(device, activation):
    key, shape = randfuse.key(2, device), (4, 70)
    z, grad = torch.full(shape, float("inf"), device=device), torch.ones(shape, device=device)
    dz = call("act_dropout_grad", grad, z, activation, key, 0.5, None, 0, 0)
    assert not dz[~output_mask(shape, 0.5, key, device)].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_to_second_order(device, activation):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    tensors = [t.requires_grad_() for t in operands(3, 4, 5, torch.float64, device)[:4]]
    run = lambda x, w, b, r: randfuse.linear_dropout(  # noqa: E731
        x, w, b, 0.4, activation=activation, residual=r, key=randfuse.key(1)
    )
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("name", ["act_dropout", "act_dropout_grad"])
def test_gradcheck_of_the_epilogue(device, name, activation):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    a, b = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    run = lambda a, b: call(name, a, b, activation, randfuse.key(1), 0.4, None, 0, 0)  # noqa: E731
    assert torch.autograd.gradcheck(run, (a, b))
    assert torch.autograd.gradgradcheck(run, (a, b))


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saves_no_mask(activation):
    """Kept for backward: x, weight, key and, where an activation needs it, the pre-activation."""
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(256, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randfuse.linear_dropout(x, weight, p=0.1, activation=activation)
    own = {t.data_ptr() for t in (x, weight)}
    extra = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in own)
    assert extra <= 8 + (64 * 256 * 4 if activation else 0)


def test_keys_and_leading_dims(device):
    x, weight = torch.randn(3, 4, 9, device=device), torch.randn(70, 9, device=device)
    keys = randfuse.split(randfuse.key(5, device), 3)
    y = randfuse.linear_dropout(x, weight, activation="relu", key=keys)
    for g in range(3):
        part = randfuse.linear_dropout(x[g], weight, activation="relu", key=keys[g])
        torch.testing.assert_close(y[g], part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"x": torch.ones(4, 5, dtype=torch.bool)}, TypeError, "x must be float32.*, got torch.bool"),
    ({"weight": torch.ones(3, 6)}, ValueError, r"weight must have shape \(N, K=5\), got \(3, 6\)"),
    ({"bias": torch.ones(2)}, ValueError, r"bias must have shape \(N,\) = \(3,\), got \(2,\)"),
    ({"activation": "tanh"}, ValueError, "activation must be None, 'relu', 'gelu' or 'silu', got 'tanh'"),
    ({"activation": "none"}, ValueError, "activation must be None, 'relu', 'gelu' or 'silu', got 'none'"),
    ({"activation": ["relu"]}, ValueError, r"activation must be None, 'relu', 'gelu' or 'silu', got \['relu'\]"),
    ({"residual": torch.ones(4, 4)}, ValueError, r"residual must have shape \(…, N\) = \(4, 3\), got \(4, 4\)"),
    ({"residual": torch.ones(4, 3).half()}, TypeError, "residual must be torch.float32, got torch.float16"),
    ({"p": -1.0}, ValueError, r"p must be in \[0, 1\], got -1.0"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
])  # fmt: skip
def test_errors(device, kwargs, error, message):
    arguments = {"x": torch.ones(4, 5), "weight": torch.ones(3, 5), "key": randfuse.key(0)} | kwargs
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=f"^linear_dropout: {message}"):
        randfuse.linear_dropout(**arguments)


def test_eval_and_autocast(device):
    x, weight, bias, residual, _ = operands(6, 40, 5, torch.float32, device)
    y = randfuse.linear_dropout(x, weight, bias, 0.5, training=False, activation="gelu", residual=residual)
    assert_bitwise_equal(y, residual + F.gelu(F.linear(x, weight, bias)))
    with torch.autocast(device, torch.bfloat16):
        assert randfuse.linear_dropout(x, weight, bias, 0.5).dtype == torch.bfloat16
        # residual + F.linear(…) promotes: a float32 residual stream is not rounded
        y = randfuse.linear_dropout(x, weight, bias, 1.0, residual=residual)
    assert_bitwise_equal(y, residual)
