"""`patch`: which layers it replaces, and that state, eval mode and training stay those of the model."""

from __future__ import annotations

import copy

import pytest
import randfuse
import torch
from randfuse.testing import assert_bitwise_equal
from torch import nn


class Block(nn.Module):
    """Order known to `forward` alone."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.drop = nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.25)
        self.nothing = None
        self.again = self.drop

    def forward(self, x):
        return self.again(self.drop(self.act(self.up(x))))


CASES = [
    (lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 4)), ["Identity", "DropoutLinear"]),
    (lambda: nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.3)), ["LinearDropout", "Identity"]),
    (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Dropout(0.3)), ["LinearDropout", "Identity", "Identity"]),
    (
        lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 4, bias=False), nn.SiLU(), nn.Dropout(0.3)),
        ["Dropout", "LinearDropout", "Identity", "Identity"],
    ),
    (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 4)),
        ["LinearDropout", "Identity", "Linear"],
    ),
    (lambda: nn.Sequential(nn.Linear(8, 4), nn.GELU("tanh"), nn.Dropout(0.3)), ["Linear", "GELU", "Dropout"]),
    (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Dropout(0.3)), ["Linear", "ReLU", "Dropout"]),
    (lambda: nn.Sequential(nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 4)), ["Dropout", "ReLU", "Linear"]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "classes"), CASES)
def test_sequences(make, classes):
    model, x = make().eval(), torch.randn(3, 8)
    parameters, keys, expected = list(model.parameters()), list(model.state_dict()), model(x)
    replaced = randfuse.patch(model)
    assert [type(layer).__name__ for layer in model] == classes
    assert all(type(model[int(name)]).__name__ == new for name, new in replaced.items())
    ours = {i for i, layer in enumerate(model) if type(layer).__module__.startswith("randfuse")}
    assert ours
    assert ours <= {int(name) for name in replaced}
    assert [a is b for a, b in zip(model.parameters(), parameters, strict=True)] == [True] * len(parameters)
    assert list(model.state_dict()) == keys
    assert not any(layer.training for layer in model)
    torch.testing.assert_close(model(x), expected)
    model.train()
    assert not torch.equal(model(x), model(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in parameters)


def test_rates_and_values_are_those_of_the_model():
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Dropout(0.25), nn.Dropout(0.75), nn.Linear(512, 512))
    plain = copy.deepcopy(model)
    randfuse.patch(model)
    x = torch.randn(32, 64)
    h, expected = model[0](x), plain[0](x).relu()
    kept = h != 0
    assert_bitwise_equal(h[~kept], torch.zeros_like(h[~kept]))
    torch.testing.assert_close(h[kept], expected[kept] / (1 - randfuse.effective_p(0.25)))
    positive = int((expected > 0).sum())
    assert abs(int(kept.sum()) / positive - 0.75) < 5 * (0.25 * 0.75 / positive) ** 0.5, "5 standard errors"
    assert model[4].p == 0.75
    assert model[4].in_features == 512


def test_modules_outside_a_sequence():
    block = Block()
    assert randfuse.patch(block) == {"drop": "Dropout", "again": "Dropout"}
    assert block.drop is block.again
    assert type(block.drop) is randfuse.nn.Dropout
    assert block.drop.p == 0.25
    assert type(block.up) is nn.Linear
    nested = nn.ModuleDict({"a": nn.Sequential(Block(), nn.Dropout(0.1), nn.Linear(16, 2))})
    assert randfuse.patch(nested) == {
        "a.1": "Identity", "a.2": "DropoutLinear", "a.0.drop": "Dropout", "a.0.again": "Dropout"
    }  # fmt: skip
    assert randfuse.patch(nested) == {}, "a second time there is nothing left"


def test_dropout_keeps_its_own_mode():
    """Monte-Carlo dropout: a model in eval mode, its dropout in training mode."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5)).eval()
    model[1].train()
    randfuse.patch(model)
    x = torch.randn(3, 8)
    assert not torch.equal(model(x), model(x))


def test_left_alone():
    class Mine(nn.Dropout):
        pass

    hooked = nn.Dropout(0.1)
    hooked.register_forward_hook(lambda *_: None)
    own = nn.Linear(4, 4)
    own.forward = lambda x: x
    model = nn.Sequential(
        Mine(0.1), nn.Linear(4, 4), nn.Dropout(0.1, inplace=True), nn.Linear(4, 4), hooked, own, Mine()
    )
    before = list(model)
    assert randfuse.patch(model) == {}
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_a_schedule_finds_the_patched_layers():
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 4), nn.LSTM(4, 4), nn.Dropout(0.3))
    randfuse.patch(model)
    schedule = randfuse.nn.DropoutSchedule(model, p=0.4, steps=10)
    schedule.step()
    assert float(model[1].p) == pytest.approx(0.4)
    assert model[1].p is model[3].p
