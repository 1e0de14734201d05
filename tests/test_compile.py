"""Compiled, exported, checkpointed and vmapped calls give the masks of eager ones."""

from __future__ import annotations

import pytest
import randfuse
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from randfuse.testing import assert_bitwise_equal
from torch.utils.checkpoint import checkpoint

W = torch.randn(7, 40)


def ops(key, p=0.4):
    """The family as functions of x alone."""
    return {
        "dropconnect_linear": lambda x: randfuse.dropconnect_linear(x, W, p=p, key=key),
        "dropout": lambda x: randfuse.dropout(x, p, key=key),
        "dropout_linear": lambda x: randfuse.dropout_linear(x, W, p=p, key=key),
        "linear_dropout": lambda x: randfuse.linear_dropout(x, W, p=p, activation="gelu", key=key),
        "mixout_linear": lambda x: randfuse.mixout_linear(x, W, W / 2, p=p, key=key),
        "multi_sample_linear": lambda x: randfuse.multi_sample_linear(x, W, p=p, num_samples=2, key=key),
        "multi_sample_mean": lambda x: randfuse.multi_sample_linear(x, W, p=p, num_samples=5, reduce="mean", key=key),
        "multi_sample_cross_entropy": lambda x: randfuse.multi_sample_cross_entropy(
            x, W, torch.zeros_like(x[..., 0], dtype=torch.int64), p=p, num_samples=2, reduction="none", key=key
        ),
    }


NAMES = list(ops(None))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_fullgraph_with_few_compilations(name, backend):
    """Six keys, six tensors p, values and gradients bitwise those of eager; at most two compilations."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x, key, p):
        y = ops(key, p)[name](x)
        return y, torch.autograd.grad(y.sum(), x)[0]

    with randfuse.use_backend(backend):
        compiled = torch.compile(lambda x, key, p: ops(key, p)[name](x), backend=counter, fullgraph=True)
        for seed in range(6):
            x = torch.randn(5, 40, requires_grad=True)
            key, p = randfuse.key(seed), torch.tensor(0.1 * (seed + 1))
            y = compiled(x, key, p)
            (dx,) = torch.autograd.grad(y.sum(), x)
            expected = step(x, key, p)
            assert_bitwise_equal(y, expected[0])
            assert_bitwise_equal(dx, expected[1])
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("granularity", ["column", "block"])
def test_structured_fullgraph(granularity, backend):
    """Six keys and two batch sizes, values and gradients bitwise those of eager; at most two compilations."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, w, key):
        return randfuse.dropout_linear(x, w, p=0.4, granularity=granularity, block_size=32, key=key)

    with randfuse.use_backend(backend):
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        for seed in range(6):
            x, w = torch.randn(5 + seed % 2, 100, requires_grad=True), torch.randn(7, 100, requires_grad=True)
            key = randfuse.key(seed)
            y, expected = compiled(x, w, key), function(x, w, key)
            assert_bitwise_equal(y, expected)
            pairs = zip(*(torch.autograd.grad(t.sum(), (x, w)) for t in (y, expected)), strict=True)
            for got, wanted in pairs:
                assert_bitwise_equal(got, wanted)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_inductor(name, where, monkeypatch):
    monkeypatch.setattr(f"{__name__}.W", W.to(where))
    x, key = torch.randn(5, 40, device=where, requires_grad=True), randfuse.key(1, where)
    y = torch.compile(ops(key)[name], fullgraph=True)(x)
    expected = ops(key)[name](x)
    assert_bitwise_equal(y, expected)
    dx, expected_dx = (torch.autograd.grad(t.sum(), x)[0] for t in (y, expected))
    assert_bitwise_equal(dx, expected_dx)


def test_two_calls_in_a_training_graph_stay_two():
    """The compiler merges equal random calls whose randomness it cannot see; a drawn key is an input it can."""

    def two(x):
        return randfuse.dropout(x, 0.5), randfuse.dropout(x, 0.5)

    x = torch.ones(32, 32, requires_grad=True)
    a, b = torch.compile(two, backend="aot_eager", fullgraph=True)(x)
    assert not torch.equal(a, b)
    (a + b).sum().backward()
    assert torch.equal(x.grad, a + b), "backward must use the masks of the forward"


def test_compiled_draw_follows_manual_seed():
    compiled = torch.compile(lambda x: randfuse.dropout(x, 0.5), backend="aot_eager", fullgraph=True)
    x = torch.ones(16, 16)
    torch.manual_seed(4)
    expected = randfuse.dropout(x, 0.5)
    torch.manual_seed(4)
    assert_bitwise_equal(compiled(x), expected)
    assert not torch.equal(compiled(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_export(name):
    class Module(torch.nn.Module):
        def forward(self, x, key):
            return ops(key)[name](x)

    x, key = torch.randn(5, 40), randfuse.key(3)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Module(), (x, key), dynamic_shapes={"x": {0: rows}, "key": None})
    other = torch.randn(11, 40)
    assert_bitwise_equal(program.module()(other, randfuse.key(8)), Module()(other, randfuse.key(8)))


# A drawn key without a preserved RNG state is missing: torch documents that randomness then differs.
@pytest.mark.parametrize(("given", "preserve"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing(name, given, reentrant, preserve):
    """A given key is immune to recomputation; a drawn one is redrawn alike while the RNG state is preserved."""
    x = torch.randn(5, 40, requires_grad=True)
    function = ops(randfuse.key(3) if given else None)[name]
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    torch.manual_seed(0)
    y = checkpoint(function, x, use_reentrant=reentrant, preserve_rng_state=preserve)
    y.sum().backward()
    assert_bitwise_equal(x.grad, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_vmap(backend, name):
    x, key = torch.randn(3, 5, 40), randfuse.key(3)
    with randfuse.use_backend(backend):
        shared = torch.vmap(ops(key)[name])(x)
        for b in range(3):
            torch.testing.assert_close(shared[b], ops(key)[name](x[b]), msg="one key: the same mask for each element")
        keys = randfuse.split(key, 3)
        own = torch.vmap(lambda x, k: ops(k)[name](x))(x, keys)
        for b in range(3):
            torch.testing.assert_close(own[b], ops(keys[b])[name](x[b]), msg="a batch of keys: a mask each")


@pytest.mark.parametrize("name", NAMES)
def test_vmap_randomness_of_a_drawn_key(name):
    ones = torch.ones(3, 5, 40)
    function = ops(None)[name]
    same = torch.vmap(function, randomness="same")(ones)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(function, randomness="different")(ones)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(ones)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, None), (0, 0, None), (1, 1, 0)])
@pytest.mark.parametrize(
    "linear",
    [
        "dropconnect_linear",
        "dropout_linear",
        "linear_dropout",
        "mixout_linear",
        "multi_sample_cross_entropy",
        "multi_sample_linear",
        "multi_sample_mean",
    ],
)
def test_vmap_over_weights_and_gradients(linear, in_dims):
    """Per-sample gradients and ensembles: any operand batched, forward and reverse."""
    sizes = {"x": (5, 40), "w": (7, 40), "b": (7,)}
    batched = [
        torch.randn(*s[: (d or 0)], 3, *s[(d or 0) :])
        if (d is not None and d <= len(s) - 1) or d == 0
        else torch.randn(s)
        for s, d in zip(sizes.values(), in_dims, strict=True)
    ]
    key = randfuse.key(2)

    def loss(x, w, b):
        if linear in ("dropconnect_linear", "dropout_linear"):
            return getattr(randfuse, linear)(x, w, b, 0.4, key=key).square().sum()
        if linear == "mixout_linear":
            return randfuse.mixout_linear(x, w, w.square(), b, 0.4, key=key).square().sum()
        if linear == "multi_sample_cross_entropy":
            return randfuse.multi_sample_cross_entropy(x, w, torch.arange(5), b, 0.4, 2, key=key)
        if linear == "multi_sample_linear":
            return randfuse.multi_sample_linear(x, w, b, 0.4, 2, key=key).square().sum()
        if linear == "multi_sample_mean":
            return randfuse.multi_sample_linear(x, w, b, 0.4, 2, reduce="mean", key=key).square().sum()
        return randfuse.linear_dropout(x, w, b, 0.4, activation="silu", key=key).square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=in_dims)(*batched)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip(batched, in_dims, strict=True)]
        for a, e in zip(got, torch.func.grad(loss, argnums=(0, 1, 2))(*one), strict=True):
            torch.testing.assert_close(a[i], e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, None, None), (None, 0, None, 0), (None, None, None, 0)])
@pytest.mark.parametrize("granularity", ["column", "block"])
def test_vmap_of_structured_granularities(granularity, in_dims):
    """Any operand batched, one key or one each, forward and reverse."""
    full = torch.randn(3, 5, 70), torch.randn(3, 7, 70), torch.randn(3, 7), randfuse.split(randfuse.key(2), 3)
    batched = [t if d == 0 else t[0] for t, d in zip(full, in_dims, strict=True)]

    def loss(x, w, b, key):
        y = randfuse.dropout_linear(x, w, b, 0.4, granularity=granularity, block_size=32, key=key)
        return y.square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    got = torch.vmap(gradient, in_dims=in_dims)(*batched)
    for i in range(3):
        one = [t if d is None else t[i] for t, d in zip(batched, in_dims, strict=True)]
        for a, e in zip(got, gradient(*one), strict=True):
            torch.testing.assert_close(a[i], e, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("granularity", ["column", "block"])
def test_vmap_randomness_of_structured_granularities(granularity):
    def function(x):
        return randfuse.dropout_linear(x, torch.eye(256), p=0.5, granularity=granularity, block_size=32)

    ones = torch.ones(8, 5, 256)
    same = torch.vmap(function, randomness="same")(ones)
    assert torch.equal(same[:1].expand_as(same), same)
    different = torch.vmap(function, randomness="different")(ones)
    assert not torch.equal(different[:1].expand_as(different), different)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0)])
def test_vmap_over_a_weight_for_each_sample(in_dims):
    x, w, b = (torch.randn(s) for s in ((3, 5, 40), (3, 2, 7, 40), (3, 2, 7)))
    x, w, b = (t if d == 0 else t[0] for t, d in zip((x, w, b), in_dims, strict=True))
    loss = lambda x, w, b: randfuse.multi_sample_linear(x, w, b, 0.4, 2, key=randfuse.key(2)).square().sum()  # noqa: E731
    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=in_dims)(x, w, b)
    for i in range(3):
        one = [t if d is None else t[i] for t, d in zip((x, w, b), in_dims, strict=True)]
        for a, e in zip(got, torch.func.grad(loss, argnums=(0, 1, 2))(*one), strict=True):
            torch.testing.assert_close(a[i], e, rtol=1e-4, atol=1e-4)


def test_vmap_refuses_a_batched_p():
    with pytest.raises(ValueError, match="^dropout: p must be the same for the whole batch under vmap"):
        torch.vmap(lambda x, p: randfuse.dropout(x, p, key=randfuse.key(0)))(torch.ones(3, 4), torch.rand(3))


def test_vmap_over_an_empty_batch():
    assert torch.vmap(ops(randfuse.key(0))["dropout_linear"])(torch.ones(0, 5, 40)).shape == (0, 5, 7)


def test_meta_tensors_have_shapes():
    x, w = torch.empty(4, 6, 40, device="meta"), torch.empty(7, 40, device="meta")
    assert randfuse.dropout_linear(x, w).shape == F.linear(x, w).shape
    assert randfuse.linear_dropout(x, w, activation="relu").device.type == "meta"


def test_layers_compile_and_schedule_without_recompilation():
    model = torch.nn.Sequential(randfuse.nn.LinearDropout(40, 32, activation="relu"), randfuse.nn.DropoutLinear(32, 5))
    schedule = randfuse.nn.DropoutSchedule(model, p=0.5, steps=4, mode="linear")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(6):
        compiled(torch.randn(8, 40)).sum().backward()
        schedule.step()
    assert counter.frame_count == 1, f"{counter.frame_count} compilations"


def test_a_head_compiles_with_its_loss():
    head = randfuse.nn.MultiSampleDropoutHead(40, 7, p=torch.tensor(0.3), num_samples=4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, t, k: head(x, t, k, label_smoothing=0.1), backend=counter, fullgraph=True)
    for seed in range(4):
        x, target, key = torch.randn(8, 40), torch.randint(7, (8,)), randfuse.key(seed)
        loss = compiled(x, target, key)
        assert_bitwise_equal(loss, head(x, target, key, label_smoothing=0.1))
        loss.backward()
        head.p.fill_(0.1 * seed)
    assert counter.frame_count == 1, f"{counter.frame_count} compilations"
