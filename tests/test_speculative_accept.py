"""speculative_accept: equality with the reference, ragged batches, peculiar rows, invariance, errors.

The law itself is tested in test_speculative_law.py.
"""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
import torch._dynamo.testing
from randfuse import _extension, categorical_sample, categorical_sample_with_stats, speculative_accept, use_backend
from randfuse.testing import assert_bitwise_equal

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MODES = ["token", "block", "match", "typical"]
NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.usefixtures("tensors_lie_with_the_kernels")


def key_of(seed: int) -> torch.Tensor:
    """On the device of the test."""
    return randfuse.key(seed, torch.get_default_device())


def only_where_it_can(dtype: torch.dtype) -> None:
    if dtype == torch.float64 and torch.get_default_device().type != "cpu":
        pytest.skip("float64 is for the CPU")


def step(b: int, k: int, vocab: int, dtype: torch.dtype = torch.float32, noise: float = 0.7):
    """Target logits, drafts and their logits, which resemble the target's."""
    target = (torch.randn(b, k + 1, vocab) * 2).to(dtype)
    draft = (target[:, :k].double() + torch.randn(b, k, vocab) * noise).to(dtype)
    ids = torch.multinomial(draft.double().softmax(-1).reshape(b * k, vocab), 1).reshape(b, k) if b * k else None
    return target, torch.empty(b, k, dtype=torch.int64) if ids is None else ids, draft


def assert_same(*args, name: str = "result", **kwargs):
    """Decisions equal to the reference's, log-probabilities within float32 rounding of them."""
    got = speculative_accept(*args, **kwargs)
    with use_backend("reference"):
        expected = speculative_accept(*args, **kwargs)
    for field in ("tokens", "num_accepted", "status"):
        assert_bitwise_equal(getattr(got, field), getattr(expected, field), name=f"{name}: {field}")
    close = {"rtol": 1e-12, "atol": 1e-11} if got.logprobs.dtype == torch.float64 else {"rtol": 1e-5, "atol": 3e-6}
    torch.testing.assert_close(got.logprobs, expected.logprobs, equal_nan=True, **close)
    return got


# One token, part of a vector, a tile less one, a tile and one, several with a ragged end.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 5, 64, 1023, 1025, 3000])
def test_equals_reference(kernels_device, vocab, dtype, mode):
    only_where_it_can(dtype)
    target, ids, draft = step(4, 3, vocab, dtype)
    positions = torch.arange(4) * 7
    assert_same(target, ids, draft, mode=mode, temperature=0.8, key=key_of(1), positions=positions, name="logits")
    assert_same(target, ids, mode=mode, key=key_of(2), name="one-hot")


@pytest.mark.parametrize("mode", MODES)
def test_parameters_of_requests_equal_the_reference(kernels_device, mode):
    """Greedy and random requests side by side, each with its own filters, mask, key and draft temperature."""
    b, k, vocab = 12, 3, 1100
    target, ids, draft = step(b, k, vocab)
    everything = {
        "temperature": torch.tensor([0.0, 0.7, 1.3]).repeat(4),
        "draft_temperature": torch.tensor([1.0, 0.0, 0.5, 0.9]).repeat(3),
        "top_k": torch.randint(1, 60, (b,)),
        "top_p": torch.rand(b),
        "min_p": torch.rand(b) * 0.1,
        "bitmask": torch.randint(-(2**31), 2**31 - 1, (b, k + 1, 35), dtype=torch.int32),
        "positions": torch.randint(0, 2**62, (b,)),
        "key": randfuse.split(key_of(3), b),
    }
    for name in ("temperature", "draft_temperature", "top_k", "top_p", "min_p", "bitmask"):
        one = {n: everything[n] for n in (name, "positions", "key")}
        assert_same(target, ids, draft, mode=mode, name=name, **one)
    assert_same(target, ids, draft, mode=mode, name="all", **everything)


@pytest.mark.parametrize("mode", MODES)
def test_saved_logsumexps_change_nothing(device, mode):
    """What categorical_sample_with_stats returned stands for a read of the row; a value that is no number does not."""
    b, k, vocab = 10, 3, 2000
    target, _, draft = step(b, k, vocab)
    drawn = categorical_sample_with_stats(draft, 0.9, key=key_of(9))
    target_lse = categorical_sample_with_stats(target, 0.9).logsumexp
    args = {"mode": mode, "temperature": 0.9, "key": key_of(4)}
    plain = speculative_accept(target, drawn.tokens, draft, **args)
    drawn.logsumexp[::5] = torch.tensor([NAN, INF, -INF])
    for saved in (
        {"draft_logsumexp": drawn.logsumexp},
        {"target_logsumexp": target_lse},
        {"draft_logsumexp": drawn.logsumexp.double(), "target_logsumexp": target_lse},
    ):
        got = speculative_accept(target, drawn.tokens, draft, **args, **saved)
        assert_bitwise_equal(got.tokens, plain.tokens, name=str(list(saved)))
        assert_bitwise_equal(got.num_accepted, plain.num_accepted)
        torch.testing.assert_close(got.logprobs, plain.logprobs)
    one_hot = speculative_accept(target, drawn.tokens, target_logsumexp=target_lse, **args)
    assert_bitwise_equal(one_hot.tokens, speculative_accept(target, drawn.tokens, **args).tokens, name="one-hot drafts")
    greedy = {**args, "temperature": 0.0}  # whose facts are those of temperature 1: nothing saved is used
    for a, e in zip(speculative_accept(target, drawn.tokens, draft, target_logsumexp=target_lse, **greedy),
                    speculative_accept(target, drawn.tokens, draft, **greedy), strict=True):  # fmt: skip
        assert_bitwise_equal(a, e, name="greedy")


def test_a_saved_logsumexp_is_used(device):
    """A wrong one shows: it is not silently replaced by a read."""
    target, ids, draft = step(64, 1, 50)
    wrong = torch.full((64, 1), 50.0)  # q then is next to nothing, and every draft stands
    assert (speculative_accept(target, ids, draft, draft_logsumexp=wrong, key=key_of(1)).num_accepted == 1).all()


@pytest.mark.parametrize("mode", ["token", "block", "match"])
def test_logprobs_are_those_of_the_saved_logsumexp(device, mode):
    """Of drafts that stand, of the token after them and of the one after all of them."""
    target, ids, draft = step(64, 2, 5)
    saved = target.logsumexp(-1) + torch.randn(64, 3) * 0.3
    got = speculative_accept(target, ids, draft, mode=mode, target_logsumexp=saved, key=key_of(1))
    logprobs = target.gather(-1, got.tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1) - saved
    torch.testing.assert_close(got.logprobs, logprobs.where(got.tokens >= 0, 0.0))
    assert len(got.num_accepted.unique()) == 3


@pytest.mark.parametrize("mode", ["token", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draft_vocabulary_maps(kernels_device, dtype, mode):
    """Fewer tokens, in any order; several logits of one token; equal to the same law over all tokens."""
    only_where_it_can(dtype)
    b, k, vocab, width = 8, 2, 2100, 100
    target, ids, _ = step(b, k, vocab, dtype)
    draft = torch.randn(b, k, width).to(dtype)
    many_to_one = torch.randint(0, vocab, (width,))
    many_to_one[:32] = ids.reshape(-1).repeat(2)
    for name, mapping in (("permuted", torch.randperm(vocab)[:width]), ("many to one", many_to_one)):
        got = assert_same(target, ids, draft, mode=mode, draft_to_target=mapping, key=key_of(5), name=name)
        q = torch.zeros(b, k, vocab, dtype=torch.float64).index_add(-1, mapping, draft.double().softmax(-1))
        if dtype == torch.float64:
            whole = speculative_accept(target, ids, q.log(), mode=mode, key=key_of(5))
            assert_bitwise_equal(got.tokens, whole.tokens, name=name)


@pytest.mark.parametrize("mode", MODES)
def test_ragged_batches(device, mode):
    """num_drafts, -1 placeholders, packed rows and requests of their own are one thing."""
    b, k, vocab = 9, 4, 1300
    target, ids, draft = step(b, k, vocab)
    key, positions = randfuse.split(key_of(6), b), torch.arange(b)
    counts = torch.tensor([0, 1, 2, 3, 4, 4, 0, 2, 1])
    args = {"mode": mode, "temperature": torch.linspace(0.0, 1.5, b)}
    by_count = speculative_accept(target, ids, draft, num_drafts=counts, key=key, positions=positions, **args)
    placeholders = ids.where(torch.arange(k) < counts.unsqueeze(-1), -1)
    by_id = speculative_accept(target, placeholders, draft, key=key, positions=positions, **args)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), (counts + 1).cumsum(0)])
    rows = target[torch.arange(k + 1) <= counts.unsqueeze(-1)]
    packed = speculative_accept(rows, ids, draft, cu_num_logits=cu, key=key, positions=positions, **args)
    for name, other in (("placeholders", by_id), ("packed", packed)):
        for a, e in zip(other, by_count, strict=True):
            assert_bitwise_equal(a, e, name=name)
    for n in range(b):
        c = int(counts[n])
        alone = speculative_accept(target[n : n + 1, : c + 1], ids[n : n + 1, :c], draft[n : n + 1, :c], mode=mode,
                                   key=key[n], positions=positions[n : n + 1],
                                   temperature=float(args["temperature"][n]))  # fmt: skip
        assert_bitwise_equal(alone.tokens[0], by_count.tokens[n, : c + 1], name=f"request {n}")
        assert (by_count.tokens[n, c + 1 :] == -1).all()
        assert (by_count.logprobs[n, c + 1 :] == 0).all()
    assert (by_count.num_accepted <= counts).all()
    emitted = (by_count.tokens >= 0).sum(-1)
    assert_bitwise_equal(emitted, by_count.num_accepted + 1, name="one token after the drafts that stand")


def test_requests_without_rows_emit_nothing(device):
    target, ids, draft = step(2, 2, 40)
    cu = torch.tensor([0, 0, 3, 3])
    got = speculative_accept(target[0], ids[[0, 0, 1]], draft[[0, 0, 1]], cu_num_logits=cu, key=key_of(0))
    assert (got.tokens[[0, 2]] == -1).all()
    assert got.tokens[1, 0] >= 0
    assert got.num_accepted[[0, 2]].tolist() == got.status[[0, 2]].tolist() == [0, 0]


def peculiar(k: int = 2, vocab: int = 100):
    """Rows of every kind at every place of a request, in the target or the draft."""
    kinds = [(lambda r: r.fill_(NAN)), (lambda r: r.fill_(-INF)), (lambda r: r[[3, 7]].fill_(0)), 
             (lambda r: r.__setitem__(5, NAN)), (lambda r: r.__setitem__(slice(None, None, 2), -INF)),
             (lambda r: r.__setitem__([9, 4], INF)), (lambda r: r.copy_(r.round()))]  # fmt: skip
    places = [(kind, j, where) for kind in kinds for j in range(k + 1) for where in ("target", "draft")]
    target, ids, draft = step(len(places), k, vocab, noise=0.2)
    for n, (kind, j, where) in enumerate(places):
        if where == "target" or j == k:
            kind(target[n, j])
        if where == "draft" and j < k:
            kind(draft[n, j])
    ids[::4, 0] = 4  # the token that +inf forces
    return target, ids, draft


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peculiar_rows_equal_the_reference(kernels_device, dtype, mode):
    only_where_it_can(dtype)
    target, ids, draft = (t.to(dtype) if t.is_floating_point() else t for t in peculiar())
    got = assert_same(target, ids, draft, mode=mode, key=key_of(7), name="random")
    assert_same(target, ids, mode=mode, key=key_of(7), name="one-hot")
    assert_same(target, ids, draft, mode=mode, temperature=0.0, key=key_of(7), name="greedy")
    assert_same(target, ids, draft, mode=mode, top_k=50, top_p=0.9, min_p=0.01, key=key_of(7), name="filters")
    first = got.tokens.clamp(min=0)
    assert ((first >= 0) & (first < target.shape[-1])).all()
    assert (got.tokens[:, 0] >= 0).all(), "at least one token is emitted"


def row(**logits: float) -> torch.Tensor:
    """(40,) logits, -inf but at the tokens t1, t2 … that are named."""
    out = torch.full((40,), -INF)
    for token, z in logits.items():
        out[int(token[1:])] = z
    return out


# Target row, draft row, the draft, and what the first token may be.
NO_LAWS = [
    (row(t0=-5.0, t7=0.0), row(), 0, {0}),  # q = 0: what has p > 0 stands, u being finite
    (row(t5=0.0, t7=0.0), row(), 0, {5, 7}),
    (row(t4=0.0, t9=0.0, t12=0.0), row(t9=INF), 9, {4, 9, 12}),  # one-hot: 9 stands with 1/3
    (row(t4=-9.0, t9=0.0), row(t9=INF), 4, {4}),
    (row(t9=0.0, t12=0.0), row(t9=INF), 4, {12}),  # 4 has p = 0, and nothing is left of 9
    (row(t9=0.0), row(t9=INF), 4, {9}),  # nothing is left of p: it is taken as it is
]


@pytest.mark.parametrize("mode", ["token", "block"])
def test_drafts_of_rows_that_are_no_law(kernels_device, mode):
    for p, q, x, allowed in NO_LAWS:
        p, q = p.to(kernels_device), q.to(kernels_device)
        got = assert_same(p.expand(64, 2, 40), torch.full((64, 1), x), q.expand(64, 1, 40), mode=mode,
                          key=key_of(3), name=f"{x} of {sorted(allowed)}")  # fmt: skip
        assert set(got.tokens[:, 0].tolist()) == allowed
        assert got.logprobs[:, 0].isfinite().all()


@pytest.mark.parametrize("mode", ["token", "block"])
def test_drafts_without_probability(kernels_device, mode):
    """All pairs of drafts of which p, q, both or neither are 0: nothing of p = 0 stands, and 0 / 0 is no acceptance."""
    p, q, kinds = row(t3=0.0, t7=0.0), row(t5=0.0, t7=0.0), torch.tensor([3, 5, 7, 9])
    ids = torch.cartesian_prod(kinds, kinds).repeat(16, 1)
    n = len(ids)
    got = assert_same(p.expand(n, 3, 40), ids, q.expand(n, 2, 40), mode=mode, key=randfuse.split(key_of(2), n))
    assert set(got.tokens.unique().tolist()) == {-1, 3, 7}


def test_documented_status(device):
    """Bits of the rows up to the stop; neighbours of a bad request stay as they are."""
    b, k, vocab = 8, 2, 300
    target, ids, draft = step(b, k, vocab)
    good = speculative_accept(target, ids, draft, key=key_of(8))
    assert not good.status.any()
    target[1, 0, 5], target[2, 0, 9], target[3, 0] = NAN, INF, -INF
    ids[4, 0], ids[5, 0], ids[6, 0] = vocab, -2, -1
    draft[7, 0, 5] = NAN
    bad = speculative_accept(target, ids, draft, key=key_of(8))
    assert bad.status.tolist() == [0, 1, 2, 4, 8, 8, 0, 1]
    assert bad.tokens[2, 0] == 9
    assert bad.tokens[3].tolist() == [0, -1, -1]
    assert bad.logprobs[3, 0].isnan()
    assert (bad.num_accepted[3:7] == 0).all()
    assert (bad.tokens[4:7, 1:] == -1).all()
    assert_bitwise_equal(bad.tokens[0], good.tokens[0], name="a neighbour")
    target[5, 0, 3], ids[5] = -INF, torch.tensor([3, vocab])
    assert int(speculative_accept(target, ids, draft, key=key_of(8)).status[5]) == 0, "a bad id after the stop"
    target[0, 1, 0] = NAN
    stopped = int(speculative_accept(target, ids, draft, key=key_of(8)).status[0])
    assert stopped == int(good.num_accepted[0] >= 1), "rows after the stop do not count"


def test_greedy_is_the_walk_along_the_largest_logits(device):
    target = torch.zeros(3, 4, 2000)
    best = torch.tensor([5, 1999, 0, 1024])
    target[:, torch.arange(4), best] = 1.0
    ids = torch.tensor([[5, 1999, 0], [5, 1998, 0], [6, 1999, 0]])
    for mode in MODES:
        got = speculative_accept(target, ids, torch.randn(3, 3, 2000), temperature=0.0, mode=mode)
        assert got.num_accepted.tolist() == [3, 1, 0]
        assert got.tokens.tolist() == [[5, 1999, 0, 1024], [5, 1999, -1, -1], [5, -1, -1, -1]]
    ties = torch.zeros(1, 2, 3000)
    assert speculative_accept(ties, torch.tensor([[0]]), temperature=0.0).tokens.tolist() == [[0, 0]], "lowest index"


@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_p": 0.9, "min_p": 0.01}], ids=str)
def test_match_is_what_would_be_drawn_without_drafts(device, filters):
    """Bit for bit, for any drafts, number of them and batch mates; temperature 0 beside others."""
    b, k, vocab = 8, 2, 1100
    target, _, draft = step(b, k, vocab)
    key, positions = randfuse.split(key_of(9), b), torch.arange(b) * 100
    temperature = torch.linspace(0.0, 1.6, b)
    keys = randfuse.fold_in(key.unsqueeze(-1), positions.unsqueeze(-1) + torch.arange(k + 1))
    alone = categorical_sample(target, temperature.unsqueeze(-1).expand(b, k + 1), method="race", key=keys.reshape(-1),
                               **{n: torch.tensor(v).expand(b, k + 1) for n, v in filters.items()})  # fmt: skip
    coupled = categorical_sample(draft, 0.9, method="race", key=keys[:, :k].reshape(-1))
    args = {"mode": "match", "temperature": temperature, "key": key, "positions": positions, **filters}
    accepted = []
    for ids in (alone[:, :k], coupled, alone[:, :k].roll(1, 0), torch.full((b, k), -1)):
        got = speculative_accept(target, ids, **args)
        emitted = torch.arange(k + 1) <= got.num_accepted.unsqueeze(-1)
        assert_bitwise_equal(got.tokens, alone.where(emitted, -1), name="tokens")
        accepted.append(float(got.num_accepted.double().mean()))
    assert accepted[0] == k
    assert accepted[3] == 0
    assert accepted[1] > accepted[2], "drafts drawn with the same keys agree more often than others"


@pytest.mark.parametrize("mode", MODES)
def test_a_request_depends_on_nothing_but_itself(device, mode):
    """Not on the order of requests, their number, threads, or the padding of drafts."""
    b, k, vocab = 12, 3, 1500 if randfuse._backends._forced == "reference" else 20000
    target, ids, draft = step(b, k, vocab)
    key, temperature = randfuse.split(key_of(10), b), torch.linspace(0.0, 1.5, b)
    args = {"mode": mode, "positions": None}
    whole = speculative_accept(target, ids, draft, key=key, temperature=temperature, **args)
    order = torch.randperm(b)
    shuffled = speculative_accept(target[order], ids[order], draft[order], key=key[order],
                                  temperature=temperature[order], **args)  # fmt: skip
    assert_bitwise_equal(shuffled.tokens, whole.tokens[order], name="order")
    threads = torch.get_num_threads()
    try:
        for n in (1, 16):  # more threads than requests: tiles are dealt out
            torch.set_num_threads(n)
            for one in (0, 7):
                alone = speculative_accept(target[one : one + 1], ids[one : one + 1], draft[one : one + 1],
                                           key=key[one], temperature=float(temperature[one]), **args)  # fmt: skip
                for a, e in zip(alone, whole, strict=True):
                    assert_bitwise_equal(a[0], e[one], name=f"{n} threads, request {one}")
            again = speculative_accept(target, ids, draft, key=key, temperature=temperature, **args)
            for a, e in zip(again, whole, strict=True):
                assert_bitwise_equal(a, e, name=f"{n} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree(dtype):
    from randfuse import _C

    best = _C.build_info()["isa"]
    target, ids, draft = step(64, 3, 5000, dtype)
    target[0, 0, :3000] = -INF
    draft[1, 0, 4000] = NAN
    try:
        for mode in MODES:
            found = []
            for isa in ("baseline", "avx2", best):
                _C.cap_isa(isa)
                found.append(speculative_accept(target, ids, draft, mode=mode, key=key_of(11)))
            for other in found[:2]:
                assert_bitwise_equal(other.tokens, found[2].tokens, name=mode)
    finally:
        _C.cap_isa(best)


@pytest.mark.parametrize("mode", MODES)
def test_any_strides(device, mode):
    target, ids, draft = step(6, 3, 1200)
    key = key_of(12)
    expected = speculative_accept(target, ids, draft, mode=mode, key=key)
    wide = torch.full((6, 4, 2 * 1203), NAN)
    wide[:, :, 3:1203] = target
    layouts = {
        "padded rows": (wide[:, :, 3:1203], draft),
        "turned": (target.transpose(0, 1).contiguous().transpose(0, 1), draft.transpose(1, 2).contiguous().mT),
    }
    for name, (t, d) in layouts.items():
        got = speculative_accept(t, ids.t().contiguous().t(), d, mode=mode, key=key)
        assert_bitwise_equal(got.tokens, expected.tokens, name=name)


def test_more_than_2_to_31_logits():
    """The last request of 4 GiB, of which only rows that are read get pages."""
    vocab, rows = 2**20, 2**11 + 3
    target = torch.empty(rows, vocab, dtype=torch.bfloat16)
    target[-2:] = -INF
    target[-2, 5], target[-1, vocab - 1] = 0.0, 0.0
    cu = torch.tensor([rows - 2, rows])
    got = speculative_accept(target, torch.tensor([[5]]), cu_num_logits=cu)
    assert got.tokens.tolist() == [[5, vocab - 1]]


def test_empty_batches_and_no_drafts(device):
    for b, k in ((0, 3), (0, 0), (4, 0)):
        target, ids, draft = step(b, k, 30)
        for mode in MODES:
            got = speculative_accept(target, ids, draft, mode=mode, key=key_of(1))
            assert [tuple(t.shape) for t in got] == [(b, k + 1), (b,), (b, k + 1), (b,)]
            assert (got.tokens >= 0).all()


def test_calls_without_key_differ_and_follow_manual_seed(device):
    target = torch.zeros(8, 1, 500)
    ids = torch.empty(8, 0, dtype=torch.int64)
    torch.manual_seed(1)
    a, b = speculative_accept(target, ids).tokens, speculative_accept(target, ids).tokens
    torch.manual_seed(1)
    assert not torch.equal(a, b)
    assert torch.equal(a, speculative_accept(target, ids).tokens)


def test_compiles_as_one_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def verify(target, ids, draft, key, temperature):
        return speculative_accept(target, ids, draft, temperature=temperature, key=key, top_p=0.9)

    compiled = torch.compile(verify, backend=counter, fullgraph=True)
    for seed in range(6):
        args = *step(4, 2, 50), key_of(seed), torch.tensor(0.2 * (seed + 1))
        for a, e in zip(compiled(*args), verify(*args), strict=True):
            assert_bitwise_equal(a, e)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"
