"""Layers: state of what they replace, train and eval, keys, schedules."""

from __future__ import annotations

import copy
import pickle

import pytest
import randfuse
import torch
from randfuse.testing import assert_bitwise_equal
from torch import nn


def fine_tuned(**k):
    """Away from its anchor, where mixout is the identity."""
    layer = randfuse.nn.MixoutLinear.from_linear(nn.Linear(20, 7), **k)
    nn.init.normal_(layer.weight)
    return layer


LAYERS = [
    lambda **k: randfuse.nn.DropoutLinear(20, 7, **k),
    lambda **k: randfuse.nn.LinearDropout(20, 7, activation="gelu", **k),
    lambda **k: randfuse.nn.DropConnectLinear(20, 7, **k),
    fine_tuned,
    lambda **k: randfuse.nn.MultiSampleDropoutHead(20, 7, num_samples=3, **k),
    lambda **k: randfuse.nn.MultiSampleDropoutHead(20, 7, reduce="mean", **k),
]


@pytest.mark.parametrize("make", LAYERS)
def test_state_is_that_of_linear(make):
    layer, linear = make(p=0.3), nn.Linear(20, 7)
    assert list(layer.state_dict()) == list(linear.state_dict())
    layer.load_state_dict(linear.state_dict())
    linear.load_state_dict(layer.state_dict())
    assert isinstance(layer, nn.Linear)
    assert "p=0.3" in repr(layer)


def test_eval_is_the_plain_layer():
    x = torch.randn(3, 20)
    layer = LAYERS[0](p=0.9).eval()
    assert_bitwise_equal(layer(x), nn.Linear.forward(layer, x))
    layer = LAYERS[1](p=0.9).eval()
    assert_bitwise_equal(layer(x, residual=torch.ones(3, 7)), 1 + nn.functional.gelu(nn.Linear.forward(layer, x)))


@pytest.mark.parametrize("make", LAYERS)
def test_training_draws_a_key_or_takes_one(make):
    x, layer = torch.randn(3, 20), make(p=0.5)
    assert not torch.equal(layer(x), layer(x))
    assert_bitwise_equal(layer(x, key=randfuse.key(1)), layer(x, key=randfuse.key(1)))
    torch.manual_seed(2)
    a = layer(x)
    torch.manual_seed(2)
    assert_bitwise_equal(layer(x), a)


@pytest.mark.parametrize("make", LAYERS)
def test_copies_and_pickles(make):
    layer, x, key = make(p=torch.tensor(0.3)), torch.randn(3, 20), randfuse.key(4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bitwise_equal(twin(x, key=key), layer(x, key=key))


def test_mixout_keeps_its_anchor():
    """The pretrained parameters are taken over as objects; no state that is loaded later moves the anchor."""
    linear = nn.Linear(20, 7)
    layer, before = randfuse.nn.MixoutLinear.from_linear(linear.eval(), p=1.0), linear.weight.detach().clone()
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    layer.load_state_dict(nn.Linear(20, 7).state_dict())
    x = torch.randn(3, 20)
    assert_bitwise_equal(layer.train()(x), nn.functional.linear(x, before, layer.bias))
    layer.set_anchor()
    assert_bitwise_equal(layer(x), nn.functional.linear(x, linear.weight, layer.bias))
    assert layer.double().anchor_weight.dtype == torch.float64
    fresh = randfuse.nn.MixoutLinear(20, 7)
    with pytest.raises(RuntimeError, match="^MixoutLinear: anchor_weight must be set before training"):
        fresh(x)
    assert fresh.eval()(x).shape == (3, 7)


@pytest.mark.parametrize("make", LAYERS)
def test_bad_p(make):
    with pytest.raises(
        ValueError, match=r"^(\w*Linear|LinearDropout|MultiSampleDropoutHead): p must be in \[0, 1\], got 1.5"
    ):
        make(p=1.5)


@pytest.mark.parametrize(("granularity", "block_size"), [("column", 128), ("block", 32)])
def test_granularity_of_a_layer(granularity, block_size):
    layer = randfuse.nn.DropoutLinear(70, 7, p=0.5, granularity=granularity, block_size=block_size)
    x, key = torch.randn(3, 70), randfuse.key(1)
    how = {"granularity": granularity, "block_size": block_size}
    assert_bitwise_equal(layer(x, key=key), randfuse.dropout_linear(x, layer.weight, layer.bias, 0.5, key=key, **how))
    assert f"granularity='{granularity}'" in repr(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    with pytest.raises(TypeError, match="^DropoutLinear: p must be a float for granularity"):
        randfuse.nn.DropoutLinear(70, 7, p=torch.tensor(0.5), granularity=granularity)
    with pytest.raises(
        ValueError, match="^DropoutLinear: granularity must be 'element', 'column' or 'block', got 'row'"
    ):
        randfuse.nn.DropoutLinear(70, 7, granularity="row")


@pytest.mark.parametrize(("mode", "values"), [
    ("early", [0.4, 0.4, 0.4, 0.4, 0, 0]), ("late", [0, 0, 0, 0, 0.4, 0.4]),
    ("linear", [0.4, 0.3, 0.2, 0.1, 0, 0]), ("constant", [0.4] * 6),
])  # fmt: skip
def test_schedule(mode, values):
    model = nn.Sequential(LAYERS[0](p=0.1), nn.ReLU(), randfuse.nn.DropoutLinear(7, 3))
    schedule = randfuse.nn.DropoutSchedule(model, p=0.4, steps=4, mode=mode)
    storage, seen = schedule.p.data_ptr(), []
    for _ in values:
        seen.append(float(model[0].p))
        model(torch.ones(4, 20)).sum().backward()
        assert schedule.step() == pytest.approx(schedule.value(schedule.count))
    assert seen == pytest.approx(values)
    assert model[0].p is model[2].p is schedule.p
    assert schedule.p.data_ptr() == storage, "a change of p reallocates nothing"
    other = randfuse.nn.DropoutSchedule(model, p=0.4, steps=4, mode=mode)
    other.load_state_dict(schedule.state_dict())
    assert float(other.p) == float(schedule.p)


def test_multi_sample_head():
    """Each `reduce` is its function in training; in eval mode all are nn.Linear, and its cross entropy."""
    x, target, key = torch.randn(5, 20), torch.tensor([0, 6, -100, 2, 3]), randfuse.key(3)
    make = lambda reduce: randfuse.nn.MultiSampleDropoutHead(20, 7, p=0.4, num_samples=3, reduce=reduce)  # noqa: E731
    head = make("loss")
    arguments = {"bias": head.bias, "p": 0.4, "num_samples": 3, "key": key}
    expected = randfuse.multi_sample_cross_entropy(x, head.weight, target, label_smoothing=0.1, **arguments)
    assert_bitwise_equal(head(x, target, key=key, label_smoothing=0.1), expected)
    assert_bitwise_equal(head(x, key=key), randfuse.multi_sample_linear(x, head.weight, **arguments))
    logits = nn.functional.linear(x, head.weight, head.bias)
    assert_bitwise_equal(head.eval()(x), logits)
    torch.testing.assert_close(head(x, target), nn.functional.cross_entropy(logits, target))
    rows = head(x.reshape(5, 1, 20), target.reshape(5, 1), reduction="none", ce_weight=torch.ones(7))
    torch.testing.assert_close(rows, nn.functional.cross_entropy(logits, target, reduction="none").reshape(5, 1))
    assert make("none")(x).shape == (3, 5, 7)
    assert make("mean")(x).shape == (5, 7)
    with pytest.raises(ValueError, match="^MultiSampleDropoutHead: target must be None for reduce='mean'"):
        make("mean")(x, target)
    with pytest.raises(ValueError, match="^MultiSampleDropoutHead: reduce must be 'loss', 'mean' or 'none', got 'sum'"):
        make("sum")


@pytest.mark.parametrize("training", [True, False])
def test_multi_sample_head_takes_the_same_in_both_modes(training):
    x, target = torch.randn(5, 20).bfloat16(), torch.tensor([0, 6, -100, 2, 3])
    head = randfuse.nn.MultiSampleDropoutHead(20, 7, dtype=torch.bfloat16).train(training)
    assert head(x, target, ce_weight=torch.rand(7)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"^multi_sample_cross_entropy: target must be in \[0, C=7\)"):
        head(x, torch.full((5,), 7))
    with pytest.raises(TypeError, match=r"^MultiSampleDropoutHead: target must be given with options, got \['red"):
        head(x, reduction="none")


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"num_samples": 0}, ValueError, r"num_samples must be in \[1, 4294967295\], got 0"),
    ({"num_samples": 2.0}, TypeError, "num_samples must be an int, got float"),
    ({"num_samples": 129, "reduce": "mean"}, ValueError, r"num_samples must be in \[1, 128\], got 129"),
])  # fmt: skip
def test_multi_sample_head_errors(kwargs, error, message):
    with pytest.raises(error, match=f"^MultiSampleDropoutHead: {message}"):
        randfuse.nn.MultiSampleDropoutHead(20, 7, **kwargs)


def test_schedule_leaves_other_granularities_alone():
    model = nn.Sequential(randfuse.nn.DropoutLinear(8, 8), randfuse.nn.DropoutLinear(8, 8, p=0.25, granularity="block"))
    schedule = randfuse.nn.DropoutSchedule(model, p=0.5, steps=1)
    assert model[0].p is schedule.p
    assert model[1].p == 0.25
    model(torch.ones(2, 8))


def test_scheduled_p_reaches_the_kernel():
    model = nn.Sequential(randfuse.nn.DropoutLinear(64, 64, bias=False))
    nn.init.eye_(model[0].weight)
    schedule = randfuse.nn.DropoutSchedule(model, p=0.5, steps=1, mode="early")
    x = torch.ones(64, 64)
    assert 0.4 < float((model(x) == 0).float().mean()) < 0.6
    schedule.step()
    assert_bitwise_equal(model(x), x)


def test_tensor_p_follows_the_model():
    """Made on meta, moved later: the shared tensor stays one tensor, and subclasses are driven too."""

    class Own(randfuse.nn.DropoutLinear):
        pass

    model = nn.Sequential(Own(20, 7, device="meta"), randfuse.nn.LinearDropout(7, 3, device="meta"))
    schedule = randfuse.nn.DropoutSchedule(model, p=0.5, steps=2, mode="late")
    model.to_empty(device="cpu").half()
    schedule.step()
    assert model[0].p is model[1].p is schedule.p
    assert schedule.p.dtype == torch.float32
    assert "p=0" in repr(model)
    assert schedule.step() == 0.5 == float(model[0].p)


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"p": 1.5}, r"p must be in \[0, 1\], got 1.5"), ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"mode": "cosine"}, "mode must be 'early', 'late', 'linear' or 'constant', got 'cosine'"),
    ({"layers": [randfuse.nn.DropoutLinear(2, 2, granularity="column")]}, "layers must have granularity 'element'"),
    ({"layers": [nn.Linear(2, 2)]}, "layers must have a p, got Linear"),
    ({"model": randfuse.nn.DropoutLinear(2, 2, granularity="column")}, "model must have a layer"),
    ({"model": nn.Linear(2, 2)}, "model must have a layer of randfuse.nn with a p, got none"),
])  # fmt: skip
def test_schedule_errors(kwargs, message):
    arguments = {"model": randfuse.nn.DropoutLinear(2, 2), "p": 0.1, "steps": 3} | kwargs
    with pytest.raises(ValueError, match=f"^DropoutSchedule: {message}"):
        randfuse.nn.DropoutSchedule(**arguments)
