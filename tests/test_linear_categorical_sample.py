"""linear_categorical_sample: the tokens of categorical_sample on the whole logits, without those logits."""

from __future__ import annotations

import importlib

import pytest
import randfuse
import torch
from torch.nn import functional as F

MODULE = importlib.import_module("randfuse.ops.linear_categorical_sample")
N, D, V = 6, 16, 5000


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", 4 * 2 * V)  # two rows; for chunks of the vocabulary 1024 tokens


@pytest.fixture
def head():
    """float64 on both sides: no product is rounded so differently that a draw moves."""
    return torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64), torch.randn(V).double()


def masks() -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (N, (V + 31) // 32)).to(torch.int32)


OPTIONS = {
    "plain": {},
    "tempered": {"temperature": 0.5, "num_samples": 3},
    "rows": {"temperature": torch.linspace(0.0, 1.0, N), "exclude": torch.tensor([0, 1023, 1024, V - 1])},
    "bitmask": {"bitmask": masks()},
    "filters": {"top_k": 50, "top_p": torch.linspace(0.1, 1.0, N), "min_p": 0.01},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", ["race", "cdf"])
@pytest.mark.parametrize("keys", [None, 3, N])
def test_the_tokens_of_the_whole_logits(head, options, method, keys):
    h, w, b = head
    key = randfuse.key(1) if keys is None else randfuse.split(randfuse.key(1), keys)
    whole = randfuse.categorical_sample(F.linear(h, w, b), method=method, key=key, row_offset=7, **options)
    got = randfuse.linear_categorical_sample(h, w, b, method=method, key=key, row_offset=7, **options)
    assert torch.equal(got, whole)


def test_guidance_and_leading_dimensions(head):
    h, w, _ = head
    u, k = torch.randn_like(h), randfuse.key(2)
    for method in ("race", "cdf"):
        whole = randfuse.categorical_sample(
            F.linear(h, w), uncond_logits=F.linear(u, w), cfg_scale=0.5, method=method, key=k
        )
        got = randfuse.linear_categorical_sample(
            h.view(2, 3, D), w, uncond_hidden=u.view(2, 3, D), cfg_scale=0.5, method=method, key=k
        )
        assert torch.equal(got, whole.view(2, 3))


def test_never_a_whole_matrix_of_logits(head, monkeypatch):
    h, w, _ = head
    seen = []
    product = F.linear
    monkeypatch.setattr(MODULE.F, "linear", lambda *a: seen.append(product(*a)) or seen[-1])
    for options in ({}, {"top_k": 3}):
        seen.clear()
        randfuse.linear_categorical_sample(h, w, key=randfuse.key(0), **options)
        assert len(seen) > 2
        assert max(x.numel() for x in seen) < N * V // 2


def test_rows_without_a_token_and_empty_batches(head):
    h, w, _ = head
    none = torch.zeros(N, (V + 31) // 32, dtype=torch.int32)
    assert not randfuse.linear_categorical_sample(h, w, bitmask=none).any()
    assert randfuse.linear_categorical_sample(h[:0], w).shape == (0,)
    h[0, 0] = float("nan")
    assert randfuse.linear_categorical_sample(h, w)[0] == 0


def test_half_precision_and_no_gradient(device):
    h, w = torch.randn(N, D, device=device).bfloat16(), torch.randn(V, D, device=device).bfloat16().requires_grad_()
    out = randfuse.linear_categorical_sample(h, w, key=randfuse.key(0, device))
    assert out.shape == (N,)
    assert not out.requires_grad


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"weight": torch.zeros(V, D + 1)}, "weight must have shape"),
    ({"weight": torch.zeros(V, D).half()}, "weight must be torch.float32"),
    ({"bias": torch.zeros(V + 1)}, "bias must have shape"),
    ({"uncond_hidden": torch.zeros(N + 1, D)}, "uncond_hidden must have shape"),
    ({"temperature": torch.ones(N + 1)}, "temperature must have shape"),
    ({"temperature": -1.0}, "temperature must be 0 or in"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"top_p": torch.full((N,), 1.5)}, "top_p must be in"),
    ({"num_samples": 0}, "num_samples must be in"),
    ({"cfg_scale": float("inf")}, "cfg_scale must be a finite number"),
    ({"exclude": torch.tensor([V])}, "exclude must be in"),
    ({"bitmask": torch.zeros(N, 1, dtype=torch.int32)}, "bitmask must have shape"),
    ({"row_offset": -1}, "row_offset must be in"),
    ({"method": "gumbel"}, "method must be"),
    ({"key": torch.zeros(4, dtype=torch.int64)}, "key must have a length"),
])  # fmt: skip
def test_bad_arguments(kwargs, message):
    """Also what is found out in the op that draws is said in the name of the one that was called."""
    with pytest.raises((TypeError, ValueError), match=f"^linear_categorical_sample: {message}"):
        randfuse.linear_categorical_sample(**{"hidden": torch.zeros(N, D), "weight": torch.zeros(V, D), **kwargs})
