"""Heads with several samples on the Triton backend against the reference; where and how it runs: test_triton.py."""

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import reference
from test_triton import (
    DTYPES,
    close_to_exact,
    on_device,
    op,
    pytestmark,  # noqa: F401  the interpreter's warnings
    same_bits,
    wide,
)

SIZES = [  # samples, rows, K, N, key shape, row_offset, col_offset
    (1, 1, 1, 1, (), 0, 0),
    (3, 35, 40, 17, (5,), 2**31, 8),
    (5, 9, 70, 33, (), 3, 2**34 + 3),
    (2, 5, 0, 3, (), 0, 0),
    (2, 0, 3, 2, (5,), 0, 0),
]


def operands(device, dtype, samples, rows, K, N, own=False):
    torch.manual_seed(1)
    shapes = (rows, K), (*[samples] * own, N, K), (*[samples] * own, N), (samples, rows, N)
    return [torch.randn(s, device=device).to(dtype) for s in shapes]


@on_device
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_multi_sample_linear_and_derivatives(device, dtype, sizes, own):
    samples, rows, K, N, key_shape, *place = sizes
    x, w, b, g = operands(device, dtype, samples, rows, K, N, own)
    key = torch.randint(-(2**62), 2**62, key_shape, device=device)
    stream = key, 0.3, None, *place
    dropped = torch.stack([reference.FUNCTIONS["dropout"](x, *stream[:3], 1, m, *place) for m in range(samples)])
    for bias in (b, None):
        args = key, samples, *stream[1:]
        exact = reference.FUNCTIONS["multi_sample_linear"](*wide(x, w, bias), *args)
        plain = dropped @ w.mT + (0 if bias is None else bias.unsqueeze(-2))
        close_to_exact(op("multi_sample_linear")(x, w, bias, *args), exact, plain, "multi_sample_linear")
    exact = reference.FUNCTIONS["multi_sample_linear_dgrad"](*wide(g, w), *stream)
    drop = reference.FUNCTIONS["dropout"]
    plain = sum(drop(p, *stream[:3], 1, m, *place) for m, p in enumerate(g @ w))
    close_to_exact(op("multi_sample_linear_dgrad")(g, w, *stream), exact, plain, "dgrad")
    exact = reference.FUNCTIONS["multi_sample_linear_wgrad"](*wide(g, x), not own, *stream)
    plain = g.mT @ dropped if own else (g.mT @ dropped).sum(0)
    close_to_exact(op("multi_sample_linear_wgrad")(g, x, not own, *stream), exact, plain, "wgrad")


@on_device
def test_a_narrow_wgrad_is_cut_into_parts(device):
    """Enough rows for several programs a tile: their sum is the product, and the same on every run."""
    x, _, _, g = operands(device, torch.float32, 4, 300, 24, 5)
    stream = torch.tensor(3, device=device), 0.5, None, 0, 0
    exact = reference.FUNCTIONS["multi_sample_linear_wgrad"](*wide(g, x), True, *stream)
    first, again = (op("multi_sample_linear_wgrad")(g, x, True, *stream) for _ in range(2))
    torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-4)
    same_bits(first, again, "wgrad in parts")


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 19])
@pytest.mark.parametrize("shape", [(1, 1), (4, 3, 130), (0, 5), (5, 0)])
def test_multi_sample_scale_equals_reference(device, dtype, samples, shape):
    x, key = torch.randn(shape, device=device).to(dtype), torch.tensor(3, device=device)
    for p in (0.0, 0.3, 1.0):
        for rate in ((p, None), (0.0, torch.tensor(p, device=device))):
            for place in ((0, 0), (2**32 - 100, 2**34 - 501)):
                args = x, key, samples, *rate, *place
                expected = reference.FUNCTIONS["multi_sample_scale"](*args)
                same_bits(op("multi_sample_scale")(*args), expected, f"p={p} at {place}")


HEADS = [  # samples, rows, K, classes, key shape, row_offset, col_offset
    (1, 1, 1, 1, (), 0, 0),
    (3, 35, 40, 17, (5,), 2**31, 8),
    (2, 9, 20, 130, (), 3, 2**34 + 3),  # more classes than a program holds
    (2, 0, 3, 2, (), 0, 0),
]


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", HEADS)
@pytest.mark.parametrize("kind", ["labels", "probabilities", "ignored"])
def test_multi_sample_cross_entropy_and_gradient(device, dtype, sizes, kind):
    samples, rows, K, N, key_shape, *place = sizes
    x, w, b, _ = operands(device, dtype, samples, rows, K, N)
    w /= max(K, 1) ** 0.5
    key = torch.randint(-(2**62), 2**62, key_shape, device=device)
    target, ce_weight, ignore, smoothing = torch.randint(N, (rows,), device=device), None, -100, 0.0
    if kind == "probabilities":
        target, ce_weight = torch.rand(rows, N, device=device), torch.rand(N, device=device)
    if kind == "ignored":
        target[::3], ignore, smoothing, ce_weight = N - 1, N - 1, 0.2, torch.rand(N, device=device)
    given = target, ce_weight, key
    options = 0.3, None, ignore, smoothing, *place
    forward, backward = "multi_sample_cross_entropy", "multi_sample_cross_entropy_grad"
    exact, exact_lse = reference.FUNCTIONS[forward](*wide(x, w, b), *given, samples, *options)
    loss, lse = op(forward)(x, w, b, *given, samples, *options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)

    grad = torch.rand(rows, device=device)
    exact = reference.FUNCTIONS[backward](grad.double(), exact_lse, *wide(x, w, b), *given, *options, [True] * 3)
    got = op(backward)(grad, lse, x, w, b, *given, *options, [True] * 3)
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    masks = [reference.FUNCTIONS["dropout_mask"](key, [rows, K], 0.3, None, 1, m, *place) for m in range(samples)]
    each = (F.linear(torch.where(m, leaves[0] / (1 - randfuse.effective_p(0.3)), 0), *leaves[1:]) for m in masks)
    cast = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in (target, ce_weight)]
    rest = {"weight": cast[1], "ignore_index": ignore, "label_smoothing": smoothing, "reduction": "none"}
    losses = torch.stack([F.cross_entropy(z, cast[0], **rest) for z in each]).mean(0)
    plain = torch.autograd.grad(losses, leaves, grad.to(dtype))
    for name, a, e, s in zip(("dx", "dw", "db"), got, exact, plain, strict=True):
        if N == 1:  # gradients are 0 but for the rounding of exp(z - lse)
            assert float(a.abs().max()) <= 4 * torch.finfo(dtype).eps, name
        else:
            close_to_exact(a, e, s, name)
    only = op(backward)(grad, lse, x, w, b, *given, *options, [False, True, False])
    same_bits(only[1], got[1], "dw alone")
    assert [t.shape for t in only[::2]] == [(0,), (0,)], "what is not asked for must be empty"


@on_device
@pytest.mark.parametrize("classes", [4, 200])
def test_a_class_that_is_none_gives_nan_in_its_row_only(device, classes):
    x, w, b, _ = operands(device, torch.float32, 2, 4, 9, classes)
    target, key = torch.tensor([0, classes, -1, -100], device=device), torch.tensor(1, device=device)
    args = x, w, b, target, None, key, 2, 0.5, None, -100, 0.0, 0, 0
    loss, lse = op("multi_sample_cross_entropy")(*args)
    assert loss.isnan().tolist() == [False, True, True, False], "loss"
    assert float(loss[3]) == 0, "an ignored row"
    dx, *_ = op("multi_sample_cross_entropy_grad")(loss.new_ones(4), lse, *args[:6], *args[7:], [True] * 3)
    assert dx.isnan().any(1).tolist() == [False, True, True, False], "dx"
    assert not dx[3].any(), "gradient of an ignored row"


@on_device
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in the interpreter, of infinities
@pytest.mark.parametrize("classes", [4, 200])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_has_no_weight_adds_nothing_whatever_its_logits(device, classes, smoothing):
    """A row of NaN that counts nowhere, and a class at -inf without weight, against the reference."""
    x, w = torch.tensor([[torch.nan], [1.0]], device=device), torch.ones(classes, 1, device=device)
    bias, ce_weight = torch.zeros(classes, device=device), torch.zeros(classes, device=device)
    bias[-1], ce_weight[1] = -torch.inf, 1.0
    probabilities = torch.zeros(2, classes, device=device)
    probabilities[0, 0] = probabilities[1, 1] = 1.0
    for target in (torch.tensor([0, 1], device=device), probabilities):
        args = x, w, bias, target, ce_weight, torch.tensor(1, device=device)
        options = 0.0, None, -100, smoothing, 0, 0
        loss, lse = op("multi_sample_cross_entropy")(*args, 2, *options)
        exact, _ = reference.FUNCTIONS["multi_sample_cross_entropy"](*args, 2, *options)
        torch.testing.assert_close(loss, exact, equal_nan=True)
        rest = loss.new_ones(2), lse, *args, *options, [False, False, True]
        got = op("multi_sample_cross_entropy_grad")(*rest)[2]
        torch.testing.assert_close(
            got, reference.FUNCTIONS["multi_sample_cross_entropy_grad"](*rest)[2], equal_nan=True
        )
        assert smoothing > 0 or not got.isnan().any(), "a row without weight has no gradient"


@on_device
@pytest.mark.parametrize("classes", [6, 200])
def test_large_logits_that_are_equal_lose_no_digits(device, classes):
    """At 2^14 the log-sum-exp has steps of 2^-10; the loss is log C to seven digits all the same."""
    x, w = torch.zeros(2, 8, device=device), torch.zeros(classes, 8, device=device)
    bias, target = torch.full((classes,), 2.0**14, device=device), torch.tensor([0, 3], device=device)
    key = torch.tensor(1, device=device)
    loss, _ = op("multi_sample_cross_entropy")(x, w, bias, target, None, key, 2, 0.5, None, -100, 0.0, 0, 0)
    torch.testing.assert_close(loss, torch.tensor(float(classes), device=device).log().expand(2))


@on_device
def test_a_gradient_in_pieces_is_the_same(device, monkeypatch):
    """Room for two of five samples at a time."""
    from randfuse.triton_kernels import multi_sample_cross_entropy as kernels

    x, w, b, _ = operands(device, torch.float32, 5, 9, 24, 6)
    target, key, grad = torch.arange(9, device=device) % 6, torch.tensor(1, device=device), torch.rand(9, device=device)
    args = x, w, b, target, None, key, 5, 0.3, None, -100, 0.1, 0, 0
    _, lse = op("multi_sample_cross_entropy")(*args)
    launched, rows = [], kernels._Head.rows
    monkeypatch.setattr(kernels._Head, "rows", lambda *a: launched.append(len(a[1])) or rows(*a))
    whole = op("multi_sample_cross_entropy_grad")(grad, lse, *args[:6], *args[7:], [True] * 3)
    monkeypatch.setattr(kernels, "MOST_LOGITS", 2 * 9 * 6)
    parts = op("multi_sample_cross_entropy_grad")(grad, lse, *args[:6], *args[7:], [True] * 3)
    assert launched == [5, 2, 2, 1], "samples at a time"
    for name, a, e in zip(("dx", "dw", "db"), parts, whole, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
