"""lora_linear: equality with the composition under the same mask, derivatives, memory, dropped factors, errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import randfuse
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from randfuse import _extension
from randfuse._backends import call
from randfuse.reference import streams
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64
from torch import nn
from torch.utils.checkpoint import checkpoint

needs_extension = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
# dtype of x, dtype of the factors; the last is PEFT's way with a bfloat16 model
DTYPES = [(t, t) for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
DTYPES += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
# (M, K, N, r): single element, ragged, narrow rank, wide rank on a narrow and on a wide layer, empty
SHAPES = [
    (1, 1, 1, 1),
    (3, 7, 5, 2),
    (17, 200, 33, 16),
    (33, 130, 140, 4),
    (9, 64, 150, 129),
    (0, 5, 3, 2),
    (5, 3, 0, 2),
]


def operands(m, k, n, r, dtype=torch.float32, factors=None, device="cpu"):
    make = lambda *s, dtype=dtype: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    factors = dtype if factors is None else factors
    return make(m, k), make(n, k), make(n), make(r, k, dtype=factors), make(n, r, dtype=factors), make(m, n)


def plain(x, weight, bias, a, b, grad, mask, p, scaling):
    """What PyTorch makes of a mask that it is given, as PEFT writes it: y and the gradients of all operands."""
    x, weight, bias, a, b = (t.detach().clone().requires_grad_() for t in (x, weight, bias, a, b))
    scale = 0.0 if p == 1 else 1 / (1 - randfuse.effective_p(p))
    dropped = torch.where(mask, x.to(a.dtype) * scale, 0)
    y = (F.linear(x, weight, bias) + F.linear(F.linear(dropped, a), b) * scaling).to(x.dtype)
    return y, *torch.autograd.grad(y, (x, weight, bias, a, b), grad)


@pytest.mark.parametrize("place", [(0, 0, 0), (2, 3, 5), (2**32 - 1, 2**32 - 100, 2**35 - 5000)])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(lora_device, shape, dtypes, place):
    device = lora_device
    x, weight, bias, a, b, grad = operands(*shape, *dtypes, device)
    key, place = randfuse.key(7, device), dict(zip(("sample", "row_offset", "col_offset"), place, strict=True))
    mask = randfuse.dropout_mask(x.shape, 0.3, key=key, **place)
    inputs = [t.requires_grad_() for t in (x, weight, bias, a, b)]
    y = randfuse.lora_linear(*inputs, 1.5, 0.3, key=key, **place)
    got = y, *torch.autograd.grad(y, inputs, grad)
    exact = plain(*(t.detach().double() for t in (*inputs, grad)), mask, 0.3, 1.5)
    same = plain(*inputs, grad, mask, 0.3, 1.5)
    for name, g, e, s in zip(("y", "dx", "dw", "db", "da", "dlb"), got, exact, same, strict=True):
        # On a GPU factors are rounded to the dtype of x.
        tiny = 4 * torch.finfo(g.dtype if device == "cpu" else x.dtype).eps if g.dtype != torch.float64 else 1e-14
        assert_close_to_float64(g, e, s, name=name, tiny=tiny)


@needs_extension
@pytest.mark.parametrize("isa", ["avx2", "baseline", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [32, 200])
def test_rank_sized_results_are_not_rounded_to_16_bits(r, dtype, isa):
    """Where the library takes over from the narrow kernels (32 or 200, by ISA) too; ds is out of float16's range."""
    x, _, _, a, _, _ = operands(40, 150, 5, r, dtype, torch.float32)
    ds = 1e6 * torch.randn(40, r)
    module = _extension.module()
    best = module.cap_isa("avx512")
    try:
        module.cap_isa(isa)
        for p in (0.0, 0.5):
            mask = randfuse.dropout_mask(x.shape, p, key=randfuse.key(2))
            dropped = torch.where(mask, x.float() / (1 - p), 0)
            stream = (randfuse.key(2), p, None, 0, 0, 0)
            for name, got, left, right in (
                ("s", call("lora_linear_down", x, a, *stream), dropped, a.T),
                ("da", call("lora_linear_wgrad", ds, x, *stream), ds.T, dropped),
            ):
                assert got.dtype == torch.float32, name
                assert_close_to_float64(got, left.double() @ right.double(), left @ right, name=name, tiny=5e-7)
    finally:
        module.cap_isa(best)


@pytest.fixture
def lora_device(device, request):
    from randfuse import _backends

    if _backends._forced == "cuda":
        pytest.skip("lora_linear has no CUDA kernel of its own, by design: Triton runs it on GPUs")
    return device


def test_the_mask_is_that_of_dropout_mask(lora_device):
    """With nothing but identities the adapter shows its mask, which samples make independent."""
    x, eye = torch.randn(50, 64, device=lora_device), torch.eye(64, device=lora_device)
    key = randfuse.key(3, lora_device)
    for sample in (0, 1, 5):
        y = randfuse.lora_linear(x, torch.zeros_like(eye), None, eye, eye, p=0.4, key=key, sample=sample)
        assert_bitwise_equal(y != 0, randfuse.dropout_mask(x.shape, 0.4, key=key, sample=sample))


@pytest.mark.parametrize("r", [4, 150])
def test_dropped_nan_and_inf_do_not_reach_the_adapter(lora_device, r):
    x, _, _, a, _, _ = operands(20, 70, 5, r, device=lora_device)
    stream = (randfuse.key(2, lora_device), 0.5, None, 0, 0, 0)
    mask = randfuse.dropout_mask(x.shape, 0.5, key=stream[0])
    poisoned = torch.where(mask, x, torch.where(x > 0, math.nan, math.inf))
    assert_bitwise_equal(call("lora_linear_down", poisoned, a, *stream), call("lora_linear_down", x, a, *stream))


@pytest.mark.parametrize("r", [4, 150])
@pytest.mark.parametrize("p", [0.0, 1.0, 0.25])
def test_extremes_and_tensor_p(lora_device, p, r):
    x, weight, bias, a, b, grad = operands(9, 70, 8, r, device=lora_device)
    key = randfuse.key(0, lora_device)
    expected = plain(x, weight, bias, a, b, grad, randfuse.dropout_mask(x.shape, p, key=key), p, 2.0)
    inputs = [t.requires_grad_() for t in (x, weight, bias, a, b)]
    for given in (p, torch.tensor(p, device=lora_device)):
        y = randfuse.lora_linear(*inputs, 2.0, given, key=key)
        for got, e in zip((y, *torch.autograd.grad(y, inputs, grad)), expected, strict=True):
            torch.testing.assert_close(got, e, rtol=1e-4, atol=2e-3)


def test_without_dropout_nothing_is_drawn(lora_device):
    x, weight, bias, a, b, _ = operands(9, 70, 8, 4, device=lora_device)
    expected = F.linear(x, weight, bias) + 0.5 * x @ a.T @ b.T
    before = torch.get_rng_state()
    for p, training in ((0.0, True), (0.5, False)):
        torch.testing.assert_close(randfuse.lora_linear(x, weight, bias, a, b, 0.5, p, training), expected)
    assert torch.equal(torch.get_rng_state(), before)
    randfuse.lora_linear(x, weight, bias, a, b, 0.5, 0.5)
    assert lora_device != "cpu" or not torch.equal(torch.get_rng_state(), before)


def test_shapes_strides_and_slices(lora_device):
    x, weight, bias, a, b, _ = operands(12, 200, 9, 4, device=lora_device)
    key = randfuse.key(4, lora_device)
    run = lambda x, **k: randfuse.lora_linear(x, weight, bias, a, b, 2.0, 0.5, key=key, **k)  # noqa: E731
    whole = run(x)
    for view in (x.view(3, 4, 200), x.t().contiguous().t()):
        torch.testing.assert_close(run(view), whole.view(*view.shape[:-1], 9), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(run(x[5:], row_offset=5), whole[5:], rtol=1e-5, atol=1e-3)
    assert run(x[0]).shape == (9,)
    turned = (t.t().contiguous().t() for t in (weight, a, b))
    w, ta, tb = turned
    torch.testing.assert_close(randfuse.lora_linear(x, w, bias, ta, tb, 2.0, 0.5, key=key), whole, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("drop", ["input", "factors"])
def test_gradcheck_to_second_order(drop):
    x, weight, bias, a, b, _ = (t.requires_grad_() for t in operands(3, 9, 5, 2, torch.float64))
    run = lambda *t: randfuse.lora_linear(*t, 1.5, 0.4, drop=drop, key=randfuse.key(1))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight, bias, a, b))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias, a, b))


@pytest.mark.parametrize("name", ["lora_linear_down", "lora_linear_dgrad", "lora_linear_wgrad"])
def test_gradcheck_of_the_gradients(name):
    x, weight, _, a, _, grad = (t.requires_grad_() for t in operands(3, 9, 5, 2, torch.float64))
    ds = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    inputs = {"down": (x, a), "dgrad": (grad, weight, ds, a), "wgrad": (ds, x)}[name.rsplit("_", 1)[1]]
    run = lambda *t: call(name, *t, randfuse.key(1), 0.4, None, 3, 0, 0)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@needs_extension  # the reference is PyTorch, which saves masks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_are_x_the_weights_and_rank_sized_numbers(dtype):
    x, weight, bias, a, b, _ = operands(256, 512, 384, 8, dtype, torch.float32)
    inputs = (x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randfuse.lora_linear(*inputs, 1.0, 0.1)
    own = {t.data_ptr() for t in inputs}
    extra = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in own)
    assert extra <= 256 * 8 * 4 + 8, f"{extra} bytes beside the inputs"


@needs_extension
def test_threads_never_change_a_bit():
    x, _, _, a, _, _ = operands(100, 300, 90, 16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stream = (randfuse.key(1), 0.5, None, 0, 0, 0)
            s = call("lora_linear_down", x, a, *stream)
            results.append((s, call("lora_linear_wgrad", s, x, *stream)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_bitwise_equal(one, two)


@pytest.mark.parametrize("drop", ["input", "factors"])
def test_autocast(drop):
    x, weight, bias, a, b, _ = operands(6, 40, 5, 4)
    key = randfuse.key(3)
    for factors in (torch.float32, torch.bfloat16, torch.float16):
        fa, fb = a.to(factors), b.to(factors)
        with torch.autocast("cpu", torch.bfloat16):
            y = randfuse.lora_linear(x, weight, bias, fa, fb, 1.0, 0.3, drop=drop, key=key)
        low = (t.bfloat16() for t in (x, weight, bias))
        kept = (t if factors == torch.float32 else t.bfloat16() for t in (fa, fb))
        assert_bitwise_equal(y, randfuse.lora_linear(*low, *kept, 1.0, 0.3, drop=drop, key=key))


# --- dropped factors -----------------------------------------------------------------------------------------------


def test_factors_follow_their_stream():
    """A column of A or a row of B is dropped iff the high half of its 32-bit lane is below the threshold."""
    x, weight, _, a, b, _ = operands(4, 37, 21, 3, torch.float64)
    key, t = randfuse.key(9), streams.threshold(0.4)

    def keep(role, size):
        place, origin = torch.arange(size), torch.zeros((), dtype=torch.int64)
        return (streams.lanes(key, origin, place, op=4, width=32, rounds=10, sample=role) >> 16) >= t

    scale = 65536 / (65536 - t)
    masked_a, masked_b = a * keep(8, 37) * scale, b * keep(9, 21).unsqueeze(1) * scale
    y = randfuse.lora_linear(x, weight, None, a, b, 2.0, 0.4, drop="factors", key=key)
    torch.testing.assert_close(y, x @ weight.T + 2 * x @ masked_a.T @ masked_b.T)
    shard = randfuse.lora_linear(
        x[:, 16:], weight[:, 16:], None, a[:, 16:], b, 2.0, 0.4, drop="factors", key=key, col_offset=16
    )
    rest = x[:, :16] @ weight[:, :16].T + 2 * x[:, :16] @ masked_a[:, :16].T @ masked_b.T
    torch.testing.assert_close(shard + rest, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_are_rounded_once(dtype):
    *_, a, b, _ = operands(4, 300, 200, 3, dtype)
    scale = 1 / (1 - randfuse.effective_p(0.3))
    for got, factor in zip(randfuse.lora_ensemble(a, b, 0.3, 1, key=randfuse.key(1)), (a, b), strict=True):
        assert_bitwise_equal(got, torch.where(got != 0, (factor.float() * scale).to(dtype), 0))


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_factors_have_the_right_mean(p):
    """The mean of B̂Â over 20000 masks is BA: each entry within 6 standard errors (a false alarm in 10^6 runs or
    so). Without the factors' scale, the negative control, the mean is off by (1 - p)^2."""
    a, b = torch.rand(1, 3, dtype=torch.float64) + 1, torch.rand(2, 1, dtype=torch.float64) + 1
    n = 20000
    ea, eb = randfuse.lora_ensemble(a, b, p, n, key=randfuse.key(5))
    mean, q = eb @ ea, 1 / (1 - randfuse.effective_p(p)) ** 2
    error = (q - 1) ** 0.5 * (b @ a) / n**0.5
    assert ((mean - b @ a).abs() < 6 * error).all()
    assert ((mean / q - b @ a).abs() > 6 * error).all()


def test_ensemble_is_the_mean_of_the_layer():
    x, weight, bias, a, b, _ = operands(6, 40, 7, 3, torch.float64)
    key = randfuse.key(1)
    each = [
        randfuse.lora_linear(x, weight, bias, a, b, 2.0, 0.3, drop="factors", key=k)
        for k in randfuse.split(key, 5).unbind()
    ]
    ea, eb = randfuse.lora_ensemble(a, b, 0.3, 5, key=key)
    torch.testing.assert_close(randfuse.lora_linear(x, weight, bias, ea, eb, 2.0), torch.stack(each).mean(0))


def test_factors_leave_dropped_parts_alone():
    x, weight, _, a, b, grad = operands(8, 64, 48, 4)
    a.requires_grad_(), b.requires_grad_()
    y = randfuse.lora_linear(x, weight, None, a, b, 1.0, 0.5, drop="factors", key=randfuse.key(2))
    da, db = torch.autograd.grad(y, (a, b), grad)
    columns, rows = (da == 0).all(0), (db == 0).all(1)
    assert 0 < columns.sum() < 64
    assert 0 < rows.sum() < 48
    assert ((da == 0) == columns).all(), "a column is dropped whole"
    assert ((db == 0) == rows.unsqueeze(1)).all(), "a row is dropped whole"


# --- transforms ----------------------------------------------------------------------------------------------------


def function(key, drop="input", p=0.4):
    _, weight, bias, a, b, _ = operands(1, 40, 7, 3)
    return lambda x: randfuse.lora_linear(x, weight, bias, a, b, 1.5, p, drop=drop, key=key)


@pytest.mark.parametrize("drop", ["input", "factors"])
def test_fullgraph_with_few_compilations(drop):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    _, weight, bias, a, b, _ = operands(1, 40, 7, 3)
    a.requires_grad_()

    def run(x, key, p):
        return randfuse.lora_linear(x, weight, bias, a, b, 1.5, p, drop=drop, key=key)

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for seed in range(6):
        x = torch.randn(5, 40, requires_grad=True)
        key, p = randfuse.key(seed), torch.tensor(0.1 * (seed + 1))
        got, expected = ((y, *torch.autograd.grad(y.sum(), (x, a))) for y in (compiled(x, key, p), run(x, key, p)))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=0 if drop == "input" else 1e-5)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


@pytest.mark.parametrize("drop", ["input", "factors"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(drop, reentrant):
    x, f = torch.randn(5, 40, requires_grad=True), function(None, drop)
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(f(x).sum(), x)
    torch.manual_seed(0)
    checkpoint(f, x, use_reentrant=reentrant).sum().backward()
    assert_bitwise_equal(x.grad, expected)


@pytest.mark.parametrize("in_dims", [(0, None, None, None, None), (None, 0, None, 0, None), (0, 0, 0, 0, 0)])
def test_vmap_over_operands_and_gradients(in_dims):
    _, *sizes = (t.shape for t in operands(5, 40, 7, 3)[:5])
    shapes = [torch.Size((5, 40)), *sizes]
    batched = [torch.randn(s if d is None else (3, *s)) for s, d in zip(shapes, in_dims, strict=True)]
    keys = randfuse.split(randfuse.key(2), 3)

    def loss(key, *t):
        return randfuse.lora_linear(*t, 1.5, 0.4, key=key).square().sum()

    run = torch.func.grad(loss, argnums=(1, 2, 3, 4, 5))
    got = torch.vmap(run, in_dims=(0, *in_dims))(keys, *batched)
    for i in range(3):
        one = [t if d is None else t[i] for t, d in zip(batched, in_dims, strict=True)]
        for g, e in zip(got, run(keys[i], *one), strict=True):
            torch.testing.assert_close(g[i], e, rtol=1e-4, atol=1e-2)


# --- the layer -----------------------------------------------------------------------------------------------------


def layer(**kwargs):
    made = randfuse.nn.LoRALinear(20, 7, r=3, lora_alpha=6, **kwargs)
    nn.init.normal_(made.lora_B.weight)
    return made


def test_layer_starts_as_the_linear_that_it_wraps():
    linear, x = nn.Linear(20, 7), torch.randn(5, 20)
    wrapped = randfuse.nn.LoRALinear.from_linear(linear, r=3, p=0.5)
    torch.testing.assert_close(wrapped(x), linear(x))
    assert wrapped.weight is linear.weight
    assert {n for n, p in wrapped.named_parameters() if p.requires_grad} == {"lora_A.weight", "lora_B.weight"}
    fresh = layer()
    assert fresh.load_state_dict(linear.state_dict(), strict=False).missing_keys == ["lora_A.weight", "lora_B.weight"]
    assert "r=3, scaling=2, drop=input" in repr(fresh)
    assert layer(use_rslora=True).scaling == pytest.approx(6 / 3**0.5)


@pytest.mark.parametrize("drop", ["input", "factors"])
def test_layer_draws_a_key_or_takes_one(drop):
    made, x = layer(p=0.5, drop=drop), torch.randn(5, 20)
    assert not torch.equal(made(x), made(x))
    key = randfuse.key(1)
    factors = made.lora_A.weight, made.lora_B.weight
    expected = randfuse.lora_linear(x, made.weight, made.bias, *factors, 2.0, 0.5, drop=drop, key=key)
    for twin in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_bitwise_equal(twin(x, key=key), expected)
    schedule = randfuse.nn.DropoutSchedule(nn.Sequential(made), p=0.5, steps=1)
    schedule.step()
    torch.testing.assert_close(made(x), made.eval()(x), msg="the schedule has ended: p is 0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_merges_and_unmerges(dtype):
    made, x = layer(p=0.9, dtype=dtype, adapter_dtype=torch.float32).eval(), torch.randn(5, 20, dtype=dtype)
    before, weight, tolerance = made(x), made.weight.clone(), 1e-5 if dtype == torch.float32 else 0.1
    made.merge().merge()
    assert_bitwise_equal(made.train()(x), F.linear(x, made.weight, made.bias))
    torch.testing.assert_close(made(x), before, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(made.unmerge().unmerge().weight, weight, rtol=tolerance, atol=tolerance)


def test_state_of_a_merged_layer_is_that_of_the_unmerged_one():
    made, x = layer().eval(), torch.randn(5, 20)
    state, expected = {name: t.clone() for name, t in made.state_dict().items()}, made(x)
    merged = made.merge().state_dict()
    assert list(merged) == list(state) == ["weight", "bias", "lora_A.weight", "lora_B.weight"]
    torch.testing.assert_close(dict(merged), state)
    torch.testing.assert_close(made.weight, state["weight"] + made._update(), msg="the layer itself stays merged")
    for other in (layer().eval(), layer().eval().merge(), made):
        other.load_state_dict(merged)
        assert not other.merged
        torch.testing.assert_close(other(x), expected)


def test_layer_errors():
    with pytest.raises(ValueError, match="^LoRALinear: r must be a positive int, got 0"):
        randfuse.nn.LoRALinear(4, 4, r=0)
    with pytest.raises(ValueError, match="^LoRALinear: drop must be 'input' or 'factors', got 'rank'"):
        layer(drop="rank")
    with pytest.raises(ValueError, match=r"^LoRALinear: p must be in \[0, 1\], got 2"):
        layer(p=2)
    made = layer()
    a, b = torch.ones(3, 20), torch.ones(7, 3)
    with pytest.raises(KeyError, match=r"LoRALinear: state must have one q\.lora_B\[\.adapter\]\.weight, got \[\]"):
        made.load_adapter({"q.lora_A.weight": a}, prefix="q.")
    with pytest.raises(KeyError, match="must have one lora_A"):
        made.load_adapter({"lora_A.one.weight": a, "lora_A.two.weight": a, "lora_B.one.weight": b})
    with pytest.raises(ValueError, match=r"lora_A.weight must have shape of lora_A = \(3, 20\), got \(3, 9\)"):
        made.load_adapter({"lora_A.weight": a[:, :9], "lora_B.weight": b})
    with pytest.raises(RuntimeError, match="load_adapter must be called on an unmerged layer"):
        made.merge().load_adapter({"lora_A.weight": a, "lora_B.weight": b})


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "x must be float32.*, got torch.int64"),
    ({"weight": torch.ones(3, 6)}, ValueError, r"weight must have shape \(N, K=5\), got \(3, 6\)"),
    ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(N,\) = \(3,\), got \(4,\)"),
    ({"lora_a": torch.ones(2, 6)}, ValueError, r"lora_a must have shape \(r, K=5\), got \(2, 6\)"),
    ({"lora_a": torch.ones(5)}, ValueError, r"lora_a must have shape \(r, K=5\), got \(5,\)"),
    ({"lora_b": torch.ones(3, 4)}, ValueError, r"lora_b must have shape \(N, r\) = \(3, 2\), got \(3, 4\)"),
    ({"lora_b": torch.ones(3, 2).half()}, TypeError, "lora_b must be torch.float32, got torch.float16"),
    ({"lora_a": torch.ones(2, 5, device="meta")}, ValueError, "lora_a must be on .*, got meta"),
    ({"lora_a": None}, TypeError, "lora_a must be a Tensor, got NoneType"),
    ({"p": 2}, ValueError, r"p must be in \[0, 1\], got 2"),
    ({"p": "high"}, TypeError, "p must be a number or a 0-d floating tensor, got str"),
    ({"scaling": torch.ones(())}, TypeError, "scaling must be a number, got Tensor"),
    ({"drop": "rank"}, ValueError, "drop must be 'input' or 'factors', got 'rank'"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
    ({"key": torch.zeros(2, dtype=torch.int64), "drop": "factors"}, ValueError, r"key must have shape \(\) for"),
    ({"drop": "factors", "col_offset": 2**34 - 4}, ValueError, r"col_offset \+ K must be at most 2\*\*34"),
    ({"sample": -1}, ValueError, r"sample must be in \[0, 2\*\*32\), got -1"),
])  # fmt: skip
def test_errors(kwargs, error, message):
    arguments = {
        "x": torch.ones(4, 5),
        "weight": torch.ones(3, 5),
        "bias": torch.ones(3),
        "lora_a": torch.ones(2, 5),
        "lora_b": torch.ones(3, 2),
        "p": 0.5,
        "key": randfuse.key(0),
    }
    with pytest.raises(error, match=f"^lora_linear: {message}"):
        randfuse.lora_linear(**(arguments | kwargs))


@pytest.mark.parametrize(
    ("wrong", "got"), [(None, "must be a Tensor"), (torch.ones(3, 2, dtype=torch.int64), "must be fl")]
)
def test_autocast_casts_no_wrong_factor(wrong, got):
    x, weight, bias, a, _, _ = operands(4, 5, 3, 2)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"^lora_linear: lora_b {got}"):
        randfuse.lora_linear(x, weight, bias, a, wrong)


def test_mixed_factors_are_float32_beside_16_bits():
    x, weight, bias, a, b, _ = operands(4, 5, 3, 2, torch.bfloat16)
    with pytest.raises(TypeError, match="^lora_linear: lora_a and lora_b must be torch.float32, got torch.float32 and"):
        randfuse.lora_linear(x, weight, bias, a.float(), b)
    x, weight, bias, a, b, _ = operands(4, 5, 3, 2, torch.float64)
    with pytest.raises(TypeError, match="^lora_linear: lora_a and lora_b must be torch.float64, got torch.float32"):
        randfuse.lora_linear(x, weight, bias, a.float(), b.float())


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"num_samples": 0}, ValueError, "num_samples must be a positive int, got 0"),
    ({"lora_b": torch.ones(3, 4)}, ValueError, r"lora_b must have shape \(N, r=2\), got \(3, 4\)"),
    ({"lora_a": torch.ones(2)}, ValueError, r"lora_a must have two dimensions, got \(2,\)"),
    ({"p": -0.1}, ValueError, r"p must be in \[0, 1\], got -0.1"),
    ({"key": None}, TypeError, "key must be an int64 Tensor"),
])  # fmt: skip
def test_ensemble_errors(kwargs, error, message):
    arguments = {"lora_a": torch.ones(2, 5), "lora_b": torch.ones(3, 2), "p": 0.5, "num_samples": 2}
    with pytest.raises(error, match=f"^lora_ensemble: {message}"):
        randfuse.lora_ensemble(**({**arguments, "key": randfuse.key(0)} | kwargs))
