"""embedding_dropout and nn.EmbeddingDropout: whole rows, one fate for all occurrences, gradients, memory, errors."""

from __future__ import annotations

import math
import sys

import pytest
import randfuse
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from randfuse.reference import streams
from randfuse.testing import assert_bitwise_equal
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_device = pytest.mark.parametrize("device", DEVICES)


def row_mask(rows, p, key):
    """The decisions about rows 0 … rows - 1, from the specification of the streams alone."""
    lanes = streams.lanes(key.cpu().expand(rows), torch.arange(rows), torch.zeros(1).long(), op=22, width=16, rounds=7)
    return (lanes.squeeze(1) >= round(p * 65536)).to(key.device)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_a_masked_table(device, dtype):
    weight = torch.randn(50, 7, device=device).to(dtype).requires_grad_()
    tokens, key = torch.randint(0, 50, (3, 40), device=device), randfuse.key(5, device)
    scale = 1 / (1 - randfuse.effective_p(0.3))
    table = torch.where(row_mask(50, 0.3, key).unsqueeze(1), weight.float() * scale, 0).to(dtype)
    expected = F.embedding(tokens, table, padding_idx=4)
    grad = torch.randn(expected.shape, device=device).to(dtype)
    (exact,) = torch.autograd.grad(expected, weight, grad)
    for p in (0.3, torch.tensor(0.3, dtype=torch.float64, device=device)):
        y = randfuse.embedding_dropout(tokens.int(), weight, p, key=key, padding_idx=4)
        assert_bitwise_equal(y, expected, name=f"p = {p}")
        (dw,) = torch.autograd.grad(y, weight, grad)
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(dw, exact, rtol=4 * ulp, atol=8 * ulp)  # a sum of three occurrences, rounded
        assert not dw[4].any(), "the padding row must get no gradient"


@on_device
@pytest.mark.parametrize("p", [0.3, 1.0, torch.tensor(0.3)])
def test_deciding_about_the_table_or_about_tokens_is_the_same(device, p, monkeypatch):
    weight, tokens = torch.randn(50, 7, device=device), torch.randint(0, 50, (3, 40), device=device)
    module, key = sys.modules["randfuse.ops.embedding_dropout"], randfuse.key(5, device)
    p = p.to(device) if isinstance(p, torch.Tensor) else p
    results = []
    for rows_a_token in (0, 1):
        monkeypatch.setattr(module, "ROWS_A_TOKEN", rows_a_token)
        results.append(randfuse.embedding_dropout(tokens, weight, p, key=key, row_offset=2**32 - 50))
    assert_bitwise_equal(*results)


@on_device
def test_sparse_gradient_holds_the_rows_looked_up(device):
    weight = torch.randn(1000, 8, device=device, requires_grad=True)
    tokens, key = torch.tensor([3, 999, 3], device=device), randfuse.key(1, device)
    (sparse,) = torch.autograd.grad(randfuse.embedding_dropout(tokens, weight, 0.5, key=key, sparse=True).sum(), weight)
    (dense,) = torch.autograd.grad(randfuse.embedding_dropout(tokens, weight, 0.5, key=key).sum(), weight)
    assert sparse.is_sparse
    assert sparse._nnz() == 3
    assert_bitwise_equal(sparse.to_dense(), dense)


def test_nothing_of_the_size_of_the_table_is_made():
    """Peak of all tensors made by a forward: far below the V×H table, which no mask ever covers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    weight, tokens = torch.randn(10_000, 16), torch.randint(0, 10_000, (20,))
    with Sizes():
        randfuse.embedding_dropout(tokens, weight, 0.5)
    assert 20 * 16 <= largest < 10_000, f"the largest tensor has {largest} elements"


@on_device
def test_rate_and_independence_of_rows(device):
    """2^16 rows, p = 0.1: the rate within 4 standard errors, and so the agreement of neighbours; neither is the mask of
    weights under the same key, which is the negative control."""
    n, p = 2**16, 0.1
    weight, key = torch.ones(n, 1, device=device), randfuse.key(11, device)
    kept = randfuse.embedding_dropout(torch.arange(n, device=device), weight, p, key=key).squeeze(1) != 0
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / n))
    agree, same = 1 - 2 * p * (1 - p), lambda a, b: float((a == b).double().mean())
    slack = 4 * math.sqrt(agree * (1 - agree) / n)
    assert same(kept[1:], kept[:-1]) == pytest.approx(agree, abs=slack)
    weights = randfuse.dropconnect(weight, p, key=key).squeeze(1) != 0
    assert same(kept, weights) == pytest.approx(agree, abs=slack)
    assert same(kept, row_mask(n, p, key)) == 1


@on_device
def test_keys_of_sequences_and_shards(device):
    weight, tokens = torch.randn(60, 4, device=device), torch.randint(0, 60, (3, 5), device=device)
    keys = randfuse.split(randfuse.key(2, device), 3)
    y = randfuse.embedding_dropout(tokens, weight, 0.5, key=keys)
    for b in range(3):
        assert_bitwise_equal(y[b], randfuse.embedding_dropout(tokens[b], weight, 0.5, key=keys[b]))
    low = tokens.clamp(max=39) + 20  # tokens of the upper part of the table
    shard = randfuse.embedding_dropout(low - 20, weight[20:], 0.5, key=keys[0], row_offset=20)
    assert_bitwise_equal(shard, randfuse.embedding_dropout(low, weight, 0.5, key=keys[0]))


def test_extremes_nan_and_eval():
    weight = torch.full((9, 2), math.nan)
    tokens, key = torch.arange(9), randfuse.key(0)
    y = randfuse.embedding_dropout(tokens, weight, 0.5, key=key)
    assert_bitwise_equal(y.isnan().all(1), row_mask(9, 0.5, key))
    assert not randfuse.embedding_dropout(tokens, weight, 1.0, key=key).any(), "p = 1 gives zeros"
    state = torch.get_rng_state()
    for kwargs in ({"p": 0.0}, {"p": 0.5, "training": False}):
        assert_bitwise_equal(randfuse.embedding_dropout(tokens, weight, **kwargs), weight)
    assert torch.equal(torch.get_rng_state(), state), "nothing dropped, nothing drawn"
    assert randfuse.embedding_dropout(torch.zeros(0, 3).long(), weight, 0.5).shape == (0, 3, 2)


def test_compiled_and_vmapped():
    weight, keys = torch.randn(30, 4), randfuse.split(randfuse.key(3), 3)
    tokens = torch.randint(0, 30, (3, 6))
    run = lambda t, w, k: randfuse.embedding_dropout(t, w, 0.5, key=k)  # noqa: E731
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for k in keys:
        assert_bitwise_equal(compiled(tokens, weight, k), run(tokens, weight, k))
    assert counter.frame_count == 1, f"{counter.frame_count} compilations"
    own = torch.vmap(run, in_dims=(0, None, 0))(tokens, weight, keys)
    assert_bitwise_equal(own, torch.stack([run(t, weight, k) for t, k in zip(tokens, keys, strict=True)]))


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"tokens": [1]}, TypeError, "tokens must be an int64 or int32 Tensor, got list"),
    ({"tokens": torch.ones(2)}, TypeError, "tokens must be an int64 or int32 Tensor, got torch.float32"),
    ({"tokens": torch.ones(2, device="meta").long()}, ValueError, "tokens must be on cpu, got meta"),
    ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(V, H\), got \(3,\)"),
    ({"weight": torch.ones(3, 3).int()}, TypeError, "weight must be float32.*, got torch.int32"),
    ({"p": 1.5}, ValueError, r"p must be in \[0, 1\], got 1.5"),
    ({"key": torch.zeros(3).long()}, ValueError, "key must have a length that divides the 4 rows, got 3"),
    ({"row_offset": 2**32}, ValueError, "row_offset must be in"),
])  # fmt: skip
def test_errors(kwargs, error, message):
    arguments = {"tokens": torch.zeros(2, 2).long(), "weight": torch.ones(9, 2), "key": randfuse.key(0)} | kwargs
    with pytest.raises(error, match=f"^embedding_dropout: {message}"):
        randfuse.embedding_dropout(**arguments)


def test_token_outside_the_table():
    with pytest.raises(IndexError):
        randfuse.embedding_dropout(torch.tensor([9]), torch.ones(9, 2))


def test_layer_is_an_embedding():
    layer, plain = randfuse.nn.EmbeddingDropout(20, 3, p=0.5, padding_idx=0), nn.Embedding(20, 3, padding_idx=0)
    layer.load_state_dict(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    tokens, key = torch.randint(0, 20, (4, 6)), randfuse.key(1)
    expected = randfuse.embedding_dropout(tokens, layer.weight, 0.5, padding_idx=0, key=key)
    assert_bitwise_equal(layer(tokens, key=key), expected)
    assert_bitwise_equal(layer.eval()(tokens), plain(tokens))
    assert repr(layer) == "EmbeddingDropout(20, 3, padding_idx=0, p=0.5)"
    assert randfuse.nn.EmbeddingDropout.from_pretrained(plain.weight, freeze=False).weight.requires_grad
