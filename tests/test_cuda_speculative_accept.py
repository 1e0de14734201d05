"""speculative_accept on a real GPU against the CPU kernel: what csrc/tests cannot tell."""

from __future__ import annotations

from typing import Any

import pytest
import randfuse
import torch
from randfuse import speculative_accept, use_backend
from randfuse.testing import assert_bitwise_equal
from torch import Tensor

pytestmark = pytest.mark.gpu
MODES = ["token", "block", "match", "typical"]


@pytest.fixture(autouse=True)
def _cuda():
    with use_backend("cuda"):
        yield


def step(b: int, k: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    target = (torch.randn(b, k + 1, vocab) * 2).to(dtype)
    draft = (target[:, :k].float() + torch.randn(b, k, vocab) * 0.6).to(dtype)
    ids = torch.multinomial(draft.float().softmax(-1).reshape(b * k, vocab), 1).reshape(b, k)
    return target, ids, draft


def assert_same(*args: Tensor | None, **kwargs: Any) -> None:
    """Every decision is the CPU kernel's."""
    on_gpu = [a if a is None else a.cuda() for a in args]
    got = speculative_accept(*on_gpu, **{n: a.cuda() if isinstance(a, Tensor) else a for n, a in kwargs.items()})
    with use_backend("cpu"):
        expected = speculative_accept(*args, **kwargs)
    for field in ("tokens", "num_accepted", "status"):
        assert_bitwise_equal(getattr(got, field).cpu(), getattr(expected, field), name=field)
    torch.testing.assert_close(got.logprobs.cpu(), expected.logprobs, equal_nan=True, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 5, 1023, 1025, 50257])
def test_equals_the_cpu(mode, dtype, vocab):
    target, ids, draft = step(6, 3, vocab, dtype)
    assert_same(target, ids, draft, mode=mode, temperature=0.8, key=randfuse.key(1), positions=torch.arange(6) * 7)
    assert_same(target, ids, mode=mode, key=randfuse.key(2))


@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_requests(mode):
    """Rows after a rejection are left out here, and some decisions are taken again in float64."""
    assert_same(*step(10_000, 3, 1500), mode=mode, key=randfuse.key(3))


@pytest.mark.parametrize("mode", MODES)
def test_parameters_of_requests(mode):
    b, k, vocab = 24, 3, 5000
    target, ids, draft = step(b, k, vocab)
    counts = torch.randint(0, k + 1, (b,))
    args = {
        "mode": mode,
        "key": randfuse.split(randfuse.key(4), b),
        "positions": torch.randint(0, 2**62, (b,)),
        "temperature": torch.tensor([0.0, 0.7, 1.3]).repeat(8),
        "draft_temperature": torch.tensor([1.0, 0.0, 0.5, 0.9]).repeat(6),
        "bitmask": torch.randint(-(2**31), 2**31 - 1, (b, k + 1, (vocab + 31) // 32), dtype=torch.int32),
    }
    filters = {"top_k": torch.randint(1, 60, (b,)), "top_p": torch.rand(b), "min_p": torch.rand(b) * 0.1}
    assert_same(target, ids, draft, num_drafts=counts, **args)
    assert_same(target, ids, draft, num_drafts=counts, **args, **filters)
    args.pop("bitmask")
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), (counts + 1).cumsum(0)])
    rows = target[torch.arange(k + 1) <= counts.unsqueeze(-1)]
    assert_same(rows, ids, draft, cu_num_logits=cu, **args)


@pytest.mark.parametrize("mode", ["token", "block"])
def test_draft_vocabulary_map_and_saved_logsumexps(mode):
    b, k, vocab = 12, 3, 5000
    target, ids, _ = step(b, k, vocab)
    narrow, means = torch.randn(b, k, 300).bfloat16(), torch.randint(0, vocab, (300,))
    means[: b * k] = ids.reshape(-1)
    assert_same(target, ids, narrow, draft_to_target=means, mode=mode, key=randfuse.key(5))
    saved = {"target_logsumexp": target.double().logsumexp(-1)}
    saved["target_logsumexp"][::3] = torch.inf  # no number: the row is read
    assert_same(target, ids, narrow, draft_to_target=means, mode=mode, key=randfuse.key(5), **saved)


def test_rows_that_are_no_law_leave_neighbours_alone():
    target, ids, draft = step(9, 2, 3000, torch.float32)
    target[1, 0], target[2, 1, 5], target[3, 0, 7] = -torch.inf, torch.nan, torch.inf
    draft[4, 0], draft[5, 1, 9], ids[6, 0], ids[7, 1] = -torch.inf, torch.nan, 3000, -1
    for mode in MODES:
        assert_same(target, ids, draft, mode=mode, key=randfuse.key(6))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device_and_a_graph_takes_a_new_key(mode):
    target, ids, draft = (t.cuda() for t in step(64, 3, 50257))
    key = randfuse.key(0, "cuda")
    speculative_accept(target, ids, draft, mode=mode, key=key)
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        speculative_accept(target, ids, draft, mode=mode, key=key)
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = speculative_accept(target, ids, draft, mode=mode, key=key)
    for seed in (1, 2):
        key.copy_(randfuse.key(seed, "cuda"))
        graph.replay()
        expected = speculative_accept(target, ids, draft, mode=mode, key=randfuse.key(seed, "cuda"))
        assert_bitwise_equal(replayed.tokens, expected.tokens, name=f"seed {seed}")
