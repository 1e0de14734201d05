"""mc_dropout_predict: equality with the loop over masks, pieces, keys, bounds, memory, errors."""

from __future__ import annotations

import math
import sys

import pytest
import randfuse
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from randfuse.testing import assert_bitwise_equal

MODULE = sys.modules["randfuse.ops.mc_dropout_predict"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_loop(device, dtype):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    x, weight, bias, key = make(3, 5, 40), make(7, 40) / 6, make(7), randfuse.key(3, device)
    got = randfuse.mc_dropout_predict(x, weight, bias, 0.3, 6, key=key)
    scale = 1 / (1 - randfuse.effective_p(0.3))
    masks = [randfuse.dropout_mask((15, 40), 0.3, key=key, sample=m).reshape(3, 5, 40) for m in range(6)]
    dropped = torch.stack([torch.where(mask, x.double() * scale, 0) for mask in masks])
    q = F.linear(dropped, weight.double(), bias.double()).softmax(-1)
    mean = q.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    expected = mean, entropy, entropy + (q * q.log()).sum(-1).mean(0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    for name, a, e in zip(got._fields, got, expected, strict=True):
        assert a.dtype == torch.promote_types(dtype, torch.float32), name
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("keys", [None, 3, 12])
@pytest.mark.parametrize("rows", [1, 3, 5, 8])
def test_pieces_do_not_show(monkeypatch, rows, keys):
    """Cut anywhere, inside a key's run of rows or between runs, the answer is that of the whole."""
    x, weight = torch.randn(12, 40), torch.randn(5, 40)
    key = randfuse.key(3) if keys is None else randfuse.split(randfuse.key(3), keys)
    whole = randfuse.mc_dropout_predict(x, weight, num_samples=4, key=key, row_offset=2)
    monkeypatch.setattr(MODULE, "CHUNK", rows * 4 * 5)
    for a, e in zip(randfuse.mc_dropout_predict(x, weight, num_samples=4, key=key, row_offset=2), whole, strict=True):
        torch.testing.assert_close(a, e)


def test_doubt(device):
    """No dropout leaves no doubt between masks; a fair coin in each mask is ln 2 of it; nothing needs a gradient."""
    x, weight = torch.ones(1, 1, device=device), torch.tensor([[1e4], [-1e4]], device=device, requires_grad=True)
    sure = randfuse.mc_dropout_predict(x, weight, p=0.0)
    assert float(sure.entropy) == float(sure.mutual_information) == 0
    weight = torch.tensor([[1e4], [0.0]], device=device)  # kept: class 0; dropped: bias alone, class 1
    coin = randfuse.mc_dropout_predict(x, weight, torch.tensor([-5e3, 0.0], device=device), num_samples=512)
    assert math.isclose(float(coin.mutual_information), math.log(2), abs_tol=1e-2)
    assert not sure.mean_probs.requires_grad


def test_empty_and_vector(device):
    weight = torch.randn(3, 5, device=device)
    empty = randfuse.mc_dropout_predict(torch.ones(0, 5, device=device), weight)
    assert [t.shape for t in empty] == [(0, 3), (0,), (0,)]
    one = randfuse.mc_dropout_predict(torch.ones(5, device=device), weight)
    assert [t.shape for t in one] == [(3,), (), ()]


def test_compiles(kernels_device):
    make = lambda *s: torch.randn(s, device=kernels_device)  # noqa: E731
    x, weight, key = make(6, 40), make(5, 40), randfuse.key(1, kernels_device)
    function = lambda x, key: tuple(randfuse.mc_dropout_predict(x, weight, num_samples=4, key=key))  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, e in zip(compiled(x, key), function(x, key), strict=True):
        assert_bitwise_equal(a, e)


def test_one_graph_for_all_numbers_of_rows(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK", 4 * 5 * 2)  # two rows a piece: pieces would be unrolled
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight, key = torch.randn(5, 40), randfuse.key(1)
    function = lambda x: tuple(randfuse.mc_dropout_predict(x, weight, num_samples=4, key=key))  # noqa: E731
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for rows in (6, 9, 14, 23, 30):
        x = torch.randn(rows, 40)
        for a, e in zip(compiled(x), function(x), strict=True):
            torch.testing.assert_close(a, e)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"x": torch.ones(4, 5).int()}, TypeError, "x must be float32"),
    ({"weight": torch.ones(2, 6)}, ValueError, r"weight must have shape \(N, K=5\)"),
    ({"num_samples": -1}, ValueError, "num_samples must be in .*, got -1"),
    ({"p": 2}, ValueError, r"p must be in \[0, 1\], got 2"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
])  # fmt: skip
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=f"^mc_dropout_predict: {message}"):
        randfuse.mc_dropout_predict(**({"x": torch.ones(4, 5), "weight": torch.ones(2, 5)} | kwargs))
