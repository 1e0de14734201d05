"""nn.WeightDrop and nn.LockedDropout: masks shared over time, gradients of raw weights, state, cuDNN's buffer."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import randfuse
import torch
from randfuse.testing import assert_bitwise_equal
from torch import nn

MODULES = {
    "lstm": lambda **k: nn.LSTM(6, 8, **k),
    "gru, two layers, bidirectional": lambda **k: nn.GRU(6, 8, num_layers=2, bidirectional=True, **k),
    "lstm, no bias, batch first": lambda **k: nn.LSTM(6, 8, 2, bias=False, batch_first=True, **k),
    "lstm, projected": lambda **k: nn.LSTM(6, 8, proj_size=3, **k),
    "rnn": lambda **k: nn.RNN(6, 8, **k),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def by_hand(module, p, key):
    """The module with its hidden-to-hidden weights dropped by masks of keys derived from one."""
    other = copy.deepcopy(module)
    hidden = [n for n, _ in module.named_parameters() if "weight_hh" in n]
    with torch.no_grad():
        for i, name in enumerate(hidden):
            weight = getattr(other, name)
            weight.copy_(randfuse.dropconnect(weight, p, key=randfuse.fold_in(key, i)))
    return other, hidden


def run(module, x, **kwargs):
    """Output, and the gradients of the module's parameters by name."""
    output, _ = module(x, **kwargs)
    inner = getattr(module, "module", module)
    grads = torch.autograd.grad(output.square().sum(), list(inner.parameters()))
    return output, dict(zip((n for n, _ in inner.named_parameters()), grads, strict=True))


@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_module_with_dropped_weights(make, dtype):
    module, key, x = make(dtype=dtype), randfuse.key(3), torch.randn(5, 2, 6, dtype=dtype)
    other, hidden = by_hand(module, 0.5, key)
    expected, expected_grads = run(other, x)
    output, grads = run(randfuse.nn.WeightDrop(module, 0.5), x, key=key)
    assert_bitwise_equal(output, expected)
    for name, grad in grads.items():
        e = expected_grads[name]
        if name in hidden:  # the chain rule through the mask
            e = randfuse.dropconnect(e, 0.5, key=randfuse.fold_in(key, hidden.index(name)))
            assert (grad == 0).any(), f"{name}: a dropped weight must get no gradient"
        assert_bitwise_equal(grad, e, name=name)


@each_module
def test_state_is_that_of_the_module(make):
    """Checkpoints go both ways, nested and strict."""
    plain, dropped = nn.ModuleList([make()]), nn.ModuleList([randfuse.nn.WeightDrop(make())])
    assert list(dropped.state_dict()) == list(plain.state_dict())
    dropped.load_state_dict(plain.state_dict())
    assert_bitwise_equal(dropped[0].module.weight_hh_l0, plain[0].weight_hh_l0)
    plain.load_state_dict(dropped.state_dict())
    dropped[0].load_state_dict(plain[0].state_dict(), assign=True)
    state = dropped.state_dict()
    del state["0.weight_hh_l0"]
    with pytest.raises(RuntimeError, match="Missing key"):
        dropped.load_state_dict(state)


@each_module
def test_eval_is_the_module(make):
    layer, x = randfuse.nn.WeightDrop(make(), 0.9).eval(), torch.randn(5, 2, 6)
    state = torch.get_rng_state()
    assert_bitwise_equal(layer(x)[0], layer.module(x)[0])
    assert_bitwise_equal(layer.train()(x, key=randfuse.key(1))[0], layer(x, key=randfuse.key(1))[0])
    layer.p = 0.0
    assert_bitwise_equal(layer(x)[0], layer.module(x)[0])
    assert torch.equal(torch.get_rng_state(), state), "nothing dropped, nothing drawn"


def test_one_mask_a_call_and_another_the_next():
    layer, x = randfuse.nn.WeightDrop(nn.LSTM(6, 8), 0.5), torch.randn(1, 4, 6).expand(30, 4, 6)
    torch.manual_seed(1)
    a = layer(x)[0]
    assert not torch.equal(layer(x)[0], a)
    torch.manual_seed(1)
    assert_bitwise_equal(layer(x)[0], a)


def test_copies_pickles_and_moves():
    layer, x, key = randfuse.nn.WeightDrop(nn.LSTM(6, 8), torch.tensor(0.3)), torch.randn(5, 2, 6), randfuse.key(4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bitwise_equal(twin(x, key=key)[0], layer(x, key=key)[0])
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16(), key=key)[0].dtype == torch.bfloat16
    assert half.p.dtype == torch.float32
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])
    assert layer(packed, key=key)[0].data.shape == (5, 8)


def test_hidden_state_and_hooks():
    layer, x, key = randfuse.nn.WeightDrop(nn.GRU(6, 8), 0.5), torch.randn(5, 2, 6), randfuse.key(4)
    whole, last = layer(x, key=key)
    first, h = layer(x[:2], key=key)
    second, end = layer(x[2:], h, key=key)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end, last)
    calls = []
    layer.module.register_forward_hook(lambda *_: calls.append(1))
    layer(x)
    assert calls == [1], "hooks of the wrapped module run"


def test_flattening_moves_no_parameter(monkeypatch):
    """cuDNN wants its weights in one buffer and warns of any others. What flattening does on a GPU is done here on the
    CPU: the twin's weights move into one buffer, and gradients still reach parameters, which stay where they are."""
    flattened = []

    def flatten(self):
        weights = self._flat_weights
        buffer = torch.cat([w.detach().reshape(-1) for w in weights])
        with torch.no_grad():
            for w, part in zip(weights, buffer.split([w.numel() for w in weights]), strict=True):
                w.data = part.view(w.shape)
        flattened.append([w.data_ptr() - buffer.data_ptr() for w in weights])

    module, key, x = nn.LSTM(6, 8, num_layers=2), randfuse.key(3), torch.randn(5, 2, 6)
    layer = randfuse.nn.WeightDrop(module, 0.5)
    expected, expected_grads = run(layer, x, key=key)
    places = [p.data_ptr() for p in module.parameters()]
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", flatten)
    output, grads = run(layer, x, key=key)
    assert len(flattened) == 1, "a training forward flattens once"
    assert all(0 <= offset < sum(p.numel() for p in module.parameters()) * 4 for offset in flattened[0])
    assert [p.data_ptr() for p in module.parameters()] == places
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    assert_bitwise_equal(output, expected)
    for name in grads:
        assert_bitwise_equal(grads[name], expected_grads[name], name=name)


@pytest.mark.gpu
@each_module
def test_no_warning_on_a_gpu(make):
    layer, x = randfuse.nn.WeightDrop(make(device="cuda")), torch.randn(5, 2, 6, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            run(layer, x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's, at any break
def test_compiled_code_breaks_here_and_is_right():
    layer, head = randfuse.nn.WeightDrop(nn.LSTM(6, 8), 0.5), nn.Linear(8, 3)
    x, key = torch.randn(5, 2, 6), randfuse.key(1)
    model = lambda x, key: head(layer(x, key=key)[0])  # noqa: E731
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x, key), model(x, key))


def test_weight_drop_errors():
    with pytest.raises(TypeError, match="^WeightDrop: module must be an nn.LSTM, nn.GRU or nn.RNN, got Linear"):
        randfuse.nn.WeightDrop(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^WeightDrop: p must be in \[0, 1\], got 1.5"):
        randfuse.nn.WeightDrop(nn.GRU(2, 2), 1.5)
    with pytest.raises(ValueError, match=r"^WeightDrop: key must be an int64 Tensor of shape \(\)"):
        randfuse.nn.WeightDrop(nn.GRU(2, 2))(torch.ones(3, 1, 2), key=torch.zeros(2).long())


@pytest.mark.parametrize("shape", [(7, 3, 20), (7, 20), (7, 3, 2, 20), (0, 3, 20), (7, 0, 20)])
def test_locked_dropout(shape):
    layer, key = randfuse.nn.LockedDropout(0.4), randfuse.key(6)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x, key=key)
    mask = randfuse.dropout(torch.ones(shape[1:]), 0.4, key=key)
    torch.testing.assert_close(y, x * mask, rtol=1e-6, atol=0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_bitwise_equal(dx, mask.expand(shape).contiguous())
    if x.dim() > 2:
        turned = randfuse.nn.LockedDropout(0.4, batch_first=True)(x.transpose(0, 1), key=key)
        assert_bitwise_equal(turned, y.transpose(0, 1))


def test_locked_dropout_saves_nothing_and_follows_a_schedule():
    model = nn.Sequential(randfuse.nn.LockedDropout(0.9))
    saved, x = [], torch.randn(7, 3, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    if not randfuse._extension.problem:
        assert sum(t.numel() for t in saved) <= 7, [t.shape for t in saved]  # keys, one a step
    schedule = randfuse.nn.DropoutSchedule(model, p=0.5, steps=1)
    assert (model(x) == 0).any()
    schedule.step()
    assert_bitwise_equal(model(x), x)
    assert model.eval()(x) is x
    assert repr(model[0]) == "LockedDropout(p=0)"
    with pytest.raises(ValueError, match=r"^LockedDropout: input must have at least 2 dimensions, got \(3,\)"):
        model(torch.ones(3))
    for keys in (torch.zeros(7).long(), torch.zeros(1).long()):  # a key for each step would be a mask for each
        with pytest.raises(ValueError, match=r"^LockedDropout: key must be an int64 Tensor of shape \(\)"):
            randfuse.nn.LockedDropout(0.5)(x, key=keys)


def test_locked_dropout_compiles():
    layer, key, x = randfuse.nn.LockedDropout(0.4), randfuse.key(6), torch.randn(7, 3, 20)
    compiled = torch.compile(lambda x, key: layer(x, key=key), backend="aot_eager", fullgraph=True)
    assert_bitwise_equal(compiled(x, key), layer(x, key=key))
