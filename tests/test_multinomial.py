"""multinomial: torch.multinomial's contract, both laws, more than 2^24 categories."""

from __future__ import annotations

import importlib
import math

import pytest
import randfuse
import torch
from test_categorical_law import ALPHA, chi_square_p


def test_shapes_and_support(device):
    w = torch.tensor([[0.0, 2.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]], device=device)
    key = randfuse.key(0, device)
    for replacement in (False, True):
        out = randfuse.multinomial(w, 2, replacement, key=key)
        assert out.shape == (2, 2)
        assert out.dtype == torch.int64
        assert (w.gather(1, out) > 0).all()
        alone = randfuse.multinomial(w[1], 2, replacement, key=randfuse.split(key, 2)[1:])
        assert torch.equal(alone, out[1]), "a row does not depend on its batch"
        assert randfuse.multinomial(w[:0], 2, replacement).shape == (0, 2)
    assert randfuse.multinomial(w.half(), 2, key=key).sort(1).values[0].tolist() == [1, 3]


def test_law_with_replacement():
    w = torch.rand(40) ** 3
    out = randfuse.multinomial(w, 2**17, replacement=True, key=randfuse.key(1))
    assert chi_square_p(out.bincount(minlength=40), (w / w.sum()).double()) > ALPHA


def test_law_without_replacement():
    """Ordered pairs of successive sampling: p_i p_j / (1 − p_i)."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    out = randfuse.multinomial(p.expand(2**15, 4), 2, key=randfuse.key(2))
    assert (out[:, 0] != out[:, 1]).all()
    pairs = p.unsqueeze(1) * p / (1 - p).unsqueeze(1)
    pairs.fill_diagonal_(0)
    assert chi_square_p((out[:, 0] * 4 + out[:, 1]).bincount(minlength=16), pairs.flatten()) > ALPHA
    whole = randfuse.multinomial(torch.rand(1000), 1000, key=randfuse.key(3))
    assert torch.equal(whole.sort().values, torch.arange(1000))


def test_more_than_2_to_the_24_categories():
    """The last of 2^24 + 3 has half of the weight; torch refuses. 200 draws: outside of [50, 150] below 1e-11."""
    w = torch.full((2**24 + 3,), 1.0)
    w[-1] = 2.0**24
    out = randfuse.multinomial(w, 200, replacement=True, key=randfuse.key(4))
    assert 50 < int((out == 2**24 + 2).sum()) < 150
    assert int(out[out < 2**24].unique().numel()) > 45, "the others spread"
    with pytest.raises(RuntimeError, match=r"2\^24"):
        torch.multinomial(w, 1)


def test_shards_of_the_vocabulary_meet(monkeypatch):
    w = torch.rand(3, 100)
    monkeypatch.setattr(importlib.import_module("randfuse.ops.multinomial"), "CHUNK", 30)
    out = randfuse.multinomial(w, 2**16, replacement=True, key=randfuse.key(5))
    for row, p in zip(out, w, strict=True):
        assert chi_square_p(row.bincount(minlength=100), (p / p.sum()).double()) > ALPHA


@pytest.mark.parametrize(("args", "message"), [
    ((torch.ones(2, 3), 4), "at most the 3 weights"),
    ((torch.ones(2, 3), 0), "num_samples must be"),
    ((torch.tensor([1.0, -1.0]), 1), "finite and not negative"),
    ((torch.tensor([1.0, math.nan]), 1), "finite and not negative"),
    ((torch.tensor([1.0, math.inf]), 1), "finite and not negative"),
    ((torch.tensor([0.0, 0.0]), 1, True), "at least 1 positive"),
    ((torch.tensor([0.0, 1.0]), 2), "at least 2 positive"),
    ((torch.ones(2, 2, 2), 1), "input must have shape"),
    ((torch.ones(2, 2, dtype=torch.int64), 1), "input must be float"),
])  # fmt: skip
def test_bad_arguments(args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        randfuse.multinomial(*args)
