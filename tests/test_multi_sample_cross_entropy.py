"""multi_sample_cross_entropy: equality with F.cross_entropy over a loop of masks, memory, derivatives, errors."""

from __future__ import annotations

import math
import sys

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _backends, _extension
from randfuse.bench import memory
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64
from torch._subclasses.fake_tensor import FakeTensorMode

needs_extension = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# (B, D, C, M): single element, ragged everything, several tiles, both sides of the narrow/wide border, several chunks.
SHAPES = [(1, 1, 1, 1), (3, 7, 5, 2), (33, 130, 16, 5), (20, 100, 100, 3), (6, 70, 300, 2)]
OPTIONS = [
    {},
    {"reduction": "none", "label_smoothing": 0.1},
    {"reduction": "sum", "weighted": True},
    {"weighted": True, "label_smoothing": 0.2, "ignored": True},
    {"soft": True, "weighted": True},
    {"soft": True, "label_smoothing": 0.3, "reduction": "none"},
]


def arguments(b, d, c, dtype, device, *, soft=False, weighted=False, ignored=False, **options):
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    target = torch.randint(c, (b,), device=device)
    if ignored:
        target[::3], options["ignore_index"] = c - 1, c - 1
    if soft:
        target = make(b, c).softmax(-1)
    if weighted:
        options["ce_weight"] = make(c).abs()
    return [make(b, d), make(c, d) / math.sqrt(d), make(c)], target, options


def plain(operands, target, kept, p, options):
    """The mean of F.cross_entropy over a loop of masks, in the dtype of the operands: loss, dx, dw, db."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in operands)
    cast = lambda t: t.to(x.dtype) if t.is_floating_point() else t  # noqa: E731
    options = {("weight" if k == "ce_weight" else k): cast(v) if k == "ce_weight" else v for k, v in options.items()}
    losses = [
        F.cross_entropy(
            F.linear(torch.where(mask, x / (1 - randfuse.effective_p(p)), 0), weight, bias), cast(target), **options
        )
        for mask in kept
    ]
    loss = torch.stack(losses).mean(0)
    return loss, *torch.autograd.grad(loss, (x, weight, bias), torch.ones_like(loss))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loop(device, shape, dtype, options):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    b, d, c, samples = shape
    if options.get("ignored") and b == 1:
        pytest.skip("nothing is left: 0 / 0, tested below")
    operands, target, options = arguments(b, d, c, dtype, device, **options)
    place, key = {"row_offset": 3, "col_offset": 5}, randfuse.key(7, device)
    kept = [randfuse.dropout_mask((b, d), 0.3, key=key, sample=m, **place) for m in range(samples)]
    leaves = [t.requires_grad_() for t in operands]
    loss = randfuse.multi_sample_cross_entropy(
        leaves[0], leaves[1], target, leaves[2], 0.3, samples, **options, key=key, **place
    )
    got = loss, *torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    exact = plain([t.double() for t in operands], target, kept, 0.3, options)
    same = plain(operands, target, kept, 0.3, options)
    tiny = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-13
    for name, a, e, s in zip(("loss", "dx", "dw", "db"), got, exact, same, strict=True):
        if name != "loss" and c == 1:  # one class: gradients are 0 but for the rounding of exp(z - lse)
            assert float(a.detach().abs().max()) <= 4 * torch.finfo(dtype).eps, name
            continue
        assert_close_to_float64(a, e, s, name=name, tiny=tiny)


@pytest.mark.parametrize("c", [3, 300])
def test_all_ignored_is_nan_as_in_pytorch_and_its_rows_are_zero(device, c):
    x, weight = torch.randn(4, 9, device=device, requires_grad=True), torch.randn(c, 9, device=device)
    target = torch.full((4,), -100, device=device)
    loss = randfuse.multi_sample_cross_entropy(x, weight, target)
    assert loss.isnan()
    assert_bitwise_equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))
    rows = randfuse.multi_sample_cross_entropy(x, weight, target, reduction="none")
    assert_bitwise_equal(rows, torch.zeros(4, device=device))


@pytest.mark.parametrize("c", [5, 200])
@pytest.mark.parametrize("p", [0.0, 1.0, 0.25])
def test_extremes_and_tensor_p(device, c, p):
    (x, weight, bias), target, _ = arguments(9, 70, c, torch.float32, device)
    x.requires_grad_(), weight.requires_grad_()
    key, results = randfuse.key(0, device), []
    for given in (p, torch.tensor(p, device=device)):
        loss = randfuse.multi_sample_cross_entropy(x, weight, target, bias, given, 3, key=key)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)
    if p != 0.25:
        z = F.linear(x * (1 - p), weight, bias)
        torch.testing.assert_close(loss, F.cross_entropy(z, target))


def test_leading_dims_keys_and_strides(device):
    x, weight = torch.randn(40, 6, 2, device=device).permute(1, 2, 0), torch.randn(40, 7, device=device).t()
    target, keys = torch.randint(7, (6, 2), device=device), randfuse.split(randfuse.key(5, device), 3)
    rows = randfuse.multi_sample_cross_entropy(x, weight, target, reduction="none", key=keys)
    assert rows.shape == (6, 2)
    for g in range(3):
        part = slice(2 * g, 2 * g + 2)
        one = randfuse.multi_sample_cross_entropy(x[part], weight, target[part], reduction="none", key=keys[g])
        torch.testing.assert_close(one, rows[part])


# (B, C, M) of several chunks of rows and samples on the CPU, narrow and wide; keys: cut inside their runs and between.
@pytest.mark.parametrize(("b", "c", "samples"), [(200, 100, 64), (600, 300, 8)])
@pytest.mark.parametrize("keys", [None, 2, 40])
def test_pieces_do_not_show(kernels_device, b, c, samples, keys):
    operands, target, options = arguments(b, 20, c, torch.float32, kernels_device, label_smoothing=0.1, ignored=True)
    key = randfuse.key(4, kernels_device)
    key = key if keys is None else randfuse.split(key, keys)

    def loss_and_gradients():
        leaves = [t.detach().requires_grad_() for t in operands]
        x, weight, bias = leaves
        loss = randfuse.multi_sample_cross_entropy(x, weight, target, bias, 0.3, samples, **options, key=key)
        return loss, *torch.autograd.grad(loss, leaves)

    got = loss_and_gradients()
    with randfuse.use_backend("reference"):
        expected = loss_and_gradients()
    for name, a, e in zip(("loss", "dx", "dw", "db"), got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@needs_extension
def test_far_off_classes_have_no_subnormal_gradient():
    """On the CPU they would make the products of backward a hundred times slower. One row and one sample, so that db is
    G; the second class has e^-87.5, which is 9.98e-39 and subnormal."""
    weight, x = torch.tensor([[0.0], [-87.5], [-200.0]]), torch.ones(1, 1)
    bias, target = torch.zeros(3, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    loss = randfuse.multi_sample_cross_entropy(x, weight, target, bias, p=0.0, num_samples=1)
    (db,) = torch.autograd.grad(loss, bias)
    tiny = torch.finfo(torch.float32).tiny
    assert not ((db != 0) & (db.abs() < tiny)).any(), db


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"soft": True}], ids=["smoothed", "soft"])
def test_many_classes_lose_no_digits(device, options):
    """Sums of 32000 terms, against PyTorch's in the same dtype."""
    operands, target, options = arguments(3, 4, 32000, torch.float32, device, **options)
    key = randfuse.key(1, device)
    kept = [randfuse.dropout_mask((3, 4), 0.3, key=key, sample=m) for m in range(2)]
    leaves = [t.requires_grad_() for t in operands]
    loss = randfuse.multi_sample_cross_entropy(*leaves[:2], target, leaves[2], 0.3, 2, key=key, **options)
    got = loss, *torch.autograd.grad(loss, leaves)
    exact = plain([t.double() for t in operands], target, kept, 0.3, options)
    same = plain(operands, target, kept, 0.3, options)
    for name, a, e, s in zip(("loss", "dx", "dw", "db"), got, exact, same, strict=True):
        assert_close_to_float64(a, e, s, name=name, tiny=1e-6 if name == "loss" else 4e-6)


def test_a_row_without_weight_is_zero_whatever_its_logits(kernels_device):
    device = kernels_device  # the reference leaves gradients to PyTorch, which multiplies 0 and NaN
    x = torch.tensor([[math.nan], [1.0]], device=device, requires_grad=True)
    bias, ce_weight = torch.zeros(2, device=device, requires_grad=True), torch.tensor([0.0, 1.0], device=device)
    for target in (torch.tensor([0, 1], device=device), torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)):
        rows = randfuse.multi_sample_cross_entropy(
            x, torch.ones(2, 1, device=device), target, bias, 0.0, 2, ce_weight=ce_weight, reduction="none"
        )
        (db,) = torch.autograd.grad(rows.sum(), bias)
        assert rows[0] == 0
        torch.testing.assert_close(rows[1], torch.tensor(math.log(2), device=device))
        torch.testing.assert_close(db, torch.tensor([0.5, -0.5], device=device))


def test_traces_fake_tensors():
    """Their classes can't be read."""
    with FakeTensorMode():
        x, weight, target = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5), torch.zeros(4).long()
        loss = randfuse.multi_sample_cross_entropy(x, weight, target, key=torch.zeros((), dtype=torch.int64))
        assert torch.autograd.grad(loss, x)[0].shape == (4, 5)


def test_huge_logits_stay_finite(device):
    x, weight = torch.full((2, 4), 1e4, device=device), torch.ones(3, 4, device=device)
    loss = randfuse.multi_sample_cross_entropy(x, weight, torch.tensor([0, 1], device=device), p=0.1)
    torch.testing.assert_close(loss, torch.tensor(math.log(3), device=device))


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    operands, target, _ = arguments(5, 6, 3, torch.float64, device)
    x, weight, bias = (t.requires_grad_() for t in operands)

    def run(x, w, b):
        return randfuse.multi_sample_cross_entropy(
            x, w, target, b, 0.4, 2, label_smoothing=0.1, reduction="none", key=randfuse.key(1)
        )

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda w: run(x.detach(), w, bias.detach()), (weight,)), "x frozen"


def wide_head(dtype=torch.float32):
    """x, weight, bias and target of a head whose gradients are made in forward, and the loss of operands given."""
    operands, target, options = arguments(9, 70, 200, dtype, "cpu", label_smoothing=0.1, ignored=True)
    target[1:3] = 0

    def loss(x, weight, bias, reduction="mean"):
        return randfuse.multi_sample_cross_entropy(
            x, weight, target, bias, 0.3, 3, **options, reduction=reduction, key=randfuse.key(2)
        )

    return [t.requires_grad_() for t in operands], target, loss


def ops_called(monkeypatch, run):
    """The ops that the public function calls during run()."""
    module, names = sys.modules["randfuse.ops.multi_sample_cross_entropy"], []
    monkeypatch.setattr(module, "call", lambda op, *args: names.append(op) or _backends.call(op, *args))
    run()
    return names


NAME = "multi_sample_cross_entropy"


@needs_extension
def test_where_gradients_are_made_in_forward(monkeypatch):
    operands, _, loss = wide_head()

    def called(run):
        return ops_called(monkeypatch, run)

    assert called(lambda: loss(*operands).backward()) == [f"{NAME}_with_grads"]
    assert called(lambda: loss(*operands, "sum").backward()) == [f"{NAME}_with_grads"]
    assert called(lambda: loss(*operands, "none").sum().backward()) == [NAME, f"{NAME}_grad"]
    assert called(torch.no_grad()(lambda: loss(*operands))) == [NAME]
    assert called(lambda: loss(*(t.detach() for t in operands))) == [NAME]
    assert called(lambda: torch.func.grad(loss)(*operands))[0] == NAME
    with randfuse.use_backend("reference"):
        assert called(lambda: loss(*operands)) == [NAME]
    x, weight, bias = operands
    weight, bias = weight[:128], bias[:128]
    narrow = lambda: randfuse.multi_sample_cross_entropy(x, weight, torch.zeros(9).long(), bias)  # noqa: E731
    assert called(narrow) == [NAME]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_made_in_forward_are_those_of_backward(dtype, reduction):
    """Loss equal to the bit with and without gradients; gradients of any scale, of some operands, and taken twice."""
    operands, target, loss = wide_head(dtype)
    divisor = int((target != 199).sum()) if reduction == "mean" else 1
    y = loss(*operands, reduction)
    with torch.no_grad():
        assert_bitwise_equal(loss(*operands, reduction), y)
    rows = loss(*operands, "none")
    for scale in (1.0, -3.0):
        g = torch.tensor(scale, dtype=dtype)
        got = torch.autograd.grad(y, operands, g, retain_graph=True)
        each = (g / divisor).expand(9)
        for a, e in zip(got, torch.autograd.grad(rows, operands, each, retain_graph=True), strict=True):
            torch.testing.assert_close(a, e)
    full = torch.autograd.grad(y, operands)
    for i in range(3):  # the others frozen
        some = [t if j == i else t.detach() for j, t in enumerate(operands)]
        assert_bitwise_equal(torch.autograd.grad(loss(*some, reduction), operands[i])[0], full[i])


@needs_extension
def test_gradients_made_in_forward_under_transforms_and_autocast():
    operands, _, loss = wide_head()
    y = loss(*operands)
    expected = torch.autograd.grad(y, operands)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*operands)
    assert_bitwise_equal(compiled, y)
    for a, e in zip(torch.autograd.grad(compiled, operands), expected, strict=True):
        assert_bitwise_equal(a, e)
    plain = [t.detach() for t in operands]
    batch = torch.stack([plain[0], 2 * plain[0]])
    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None))(batch, *plain[1:])
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a[0], e)
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(*operands)
    assert low.dtype == torch.float32
    same = [t.detach().bfloat16().requires_grad_() for t in operands]
    for a, e in zip(torch.autograd.grad(low, operands), torch.autograd.grad(loss(*same), same), strict=True):
        assert_bitwise_equal(a.bfloat16(), e)


@needs_extension
@pytest.mark.parametrize("c", [4, 200])
def test_second_derivative_is_refused(c):
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(c, 5)
    loss = randfuse.multi_sample_cross_entropy(x, weight, torch.tensor([0, 1, 2]))
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="^multi_sample_cross_entropy: must be differentiated once only"):
        dx.sum().backward()


@needs_extension
@pytest.mark.parametrize(("c", "reduction"), [(8, "mean"), (300, "none"), (300, "sum")])
def test_saved_is_a_float_a_row_and_sample_or_the_gradients(c, reduction):
    x, weight = torch.randn(64, 512, requires_grad=True), torch.randn(c, 512, requires_grad=True)
    saved, target = [], torch.randint(c, (64,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randfuse.multi_sample_cross_entropy(x, weight, target, p=0.1, num_samples=16, reduction=reduction)
    own = {t.data_ptr() for t in (x, weight, target)}
    extra = [t for t in saved if t.data_ptr() not in own]
    kept = 4 * (x.numel() + weight.numel()) if reduction == "sum" else 4 * 16 * 64
    assert sum(t.numel() * t.element_size() for t in extra) <= kept + 64, [t.shape for t in extra]


@needs_extension
@pytest.mark.parametrize(("rows", "c"), [(8192, 16), (1024, 300)])  # eager's logits grow by 60 · rows · c floats
def test_peak_memory_grows_by_a_float_a_row_and_sample(rows, c):
    """Forward and backward, 4 against 64 samples: nothing but the log-sum-exps is larger (eager: logits, too)."""
    x, weight = torch.randn(rows, 64, requires_grad=True), torch.randn(c, 64, requires_grad=True)
    target = torch.randint(c, (rows,))

    def peak(samples):
        def step():
            loss = randfuse.multi_sample_cross_entropy(x, weight, target, num_samples=samples)
            return torch.autograd.grad(loss, (x, weight))

        return memory.peak(step, "cpu")

    peak(4)  # what is allocated once
    chunk = 4 * 2**20  # bytes: one chunk of logits may be fuller than another
    assert peak(64) - peak(4) <= 60 * rows * 4 + chunk
    assert peak(64) < 16 * chunk


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"weight": torch.ones(0, 5)}, ValueError, "weight must have at least one class, got 0"),
    ({"weight": torch.ones(3, 6)}, ValueError, r"weight must have shape \(N, K=5\), got \(3, 6\)"),
    ({"target": torch.zeros(4).int()}, TypeError, "target must be an int64 or floating Tensor, got torch.int32"),
    ({"target": torch.zeros(3).long()}, ValueError, r"target must have shape \(…\) = \(4,\), got \(3,\)"),
    ({"target": torch.zeros(4, 2)}, ValueError, r"target must have shape \(…, C\) = \(4, 3\), got \(4, 2\)"),
    ({"target": torch.tensor([0, 1, 3, 2])}, ValueError, r"target must be in \[0, C=3\) or ignore_index, got 3"),
    ({"target": torch.ones(4, 3, requires_grad=True)}, ValueError, "target must not require a gradient"),
    ({"target": torch.ones(4, 3), "ignore_index": 0}, ValueError, "ignore_index must be negative for floating targets"),
    ({"ce_weight": torch.ones(2)}, ValueError, r"ce_weight must have shape \(C,\) = \(3,\), got \(2,\)"),
    ({"ce_weight": torch.ones(3, requires_grad=True)}, ValueError, "ce_weight must not require a gradient"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"reduction": "max"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'max'"),
    ({"num_samples": 0}, ValueError, "num_samples must be in .*, got 0"),
    ({"p": -1}, ValueError, r"p must be in \[0, 1\], got -1"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
])  # fmt: skip
def test_errors(device, kwargs, error, message):
    if device != "cpu" and "got 3" in message and "target" in kwargs:
        pytest.skip("classes on a GPU are guarded, not read")
    given = {"x": torch.ones(4, 5), "weight": torch.ones(3, 5), "target": torch.zeros(4).long()} | kwargs
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(error, match=f"^multi_sample_cross_entropy: {message}"):
        randfuse.multi_sample_cross_entropy(**given)


def test_autocast_computes_in_low_precision_and_returns_float32(device):
    (x, weight, bias), target, _ = arguments(6, 40, 5, torch.float32, device)
    key = randfuse.key(3, device)
    with torch.autocast(device, torch.bfloat16):
        loss = randfuse.multi_sample_cross_entropy(x, weight, target, bias, key=key)
    low = [t.bfloat16() for t in (x, weight, bias)]
    assert loss.dtype == torch.float32
    assert_bitwise_equal(loss.bfloat16(), randfuse.multi_sample_cross_entropy(*low[:2], target, low[2], key=key))
