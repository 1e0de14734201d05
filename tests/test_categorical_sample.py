"""categorical_sample and its statistics: equality with the reference, rows that are not finite, invariance, errors.

The law itself is tested in test_categorical_law.py.
"""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
import torch._dynamo.testing
from randfuse import _extension, categorical_race, categorical_sample, categorical_sample_with_stats, use_backend
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
METHODS = ["cdf", "race"]
# One token, part of a vector, whole vectors, a tile less one, a tile, a tile and one, several with a ragged end.
VOCABS = [1, 2, 5, 64, 1023, 1025, 3000]
FILTERS = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**9},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 1.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.0},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.01},
]
NAN, INF = math.nan, math.inf


def reference(function, *args, **kwargs):
    with use_backend("reference"):
        return function(*args, **kwargs)


def peculiar(rows: int = 12, vocab: int = 1100) -> torch.Tensor:
    """Ordinary rows and every kind of row that is not: NaN, infinities, no support, ties, masked tiles."""
    x = torch.randn(rows, vocab) * 3
    x[0] = NAN
    x[1] = -INF
    x[2, [3, 7]] = INF
    x[3, 5] = NAN
    x[4] = 0.25
    x[5], x[5, 77] = -INF, 1.0
    x[6, :1024] = -INF
    x[7] = x[7].round()  # many ties
    x[8, 0], x[8, 1] = NAN, INF
    x[9, ::2] = -0.0
    return x


def assert_same(device, *args, **kwargs):
    """Tokens equal to the reference's; facts within PyTorch's float32 error of it; the two ops agree."""
    got = categorical_sample_with_stats(*args, **kwargs)
    expected = reference(categorical_sample_with_stats, *args, **kwargs)
    assert_bitwise_equal(got.tokens, expected.tokens, name="tokens")
    assert_bitwise_equal(categorical_sample(*args, **kwargs), got.tokens, name="tokens without facts")
    close = {"rtol": 1e-12, "atol": 1e-12} if got.entropy.dtype == torch.float64 else {"rtol": 1e-5, "atol": 3e-6}
    for name, a, b in zip(got._fields[1:], got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **close, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_equals_reference(kernels_device, vocab, dtype, method):
    x = (torch.randn(3, 8, vocab) * 3).to(dtype)
    assert_same(kernels_device, x, 0.7, num_samples=2, method=method, key=randfuse.key(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0, 2.0, 2.0**-100, 2.0**100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_peculiar_rows_equal_the_reference(kernels_device, dtype, temperature, method):
    assert_same(kernels_device, peculiar().to(dtype), temperature, num_samples=2, method=method, key=randfuse.key(3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filters_equal_the_reference(kernels_device, dtype, filters, method):
    x = peculiar().to(dtype)
    assert_same(kernels_device, x, 0.8, method=method, key=randfuse.key(4), **filters)
    assert_same(kernels_device, x[9:], 0.0, method=method, key=randfuse.key(4), **filters)


@pytest.mark.parametrize("method", METHODS)
def test_all_arguments_at_once(kernels_device, method):
    n, vocab = 24, 2500
    x, u = torch.randn(2, 12, vocab) * 3, torch.randn(2, 12, vocab)
    assert_same(
        kernels_device, x, torch.rand(2, 12) * 2, num_samples=2, method=method, key=randfuse.split(randfuse.key(0), n),
        top_k=torch.randint(1, 200, (2, 12)), top_p=torch.rand(2, 12), min_p=torch.rand(2, 12) * 0.1,
        exclude=torch.tensor([2499, 0, 1024, 7, 7]), uncond_logits=u, cfg_scale=1.5, row_offset=2**31,
        bitmask=torch.randint(-(2**31), 2**31 - 1, (n, 79), dtype=torch.int32), rows=torch.tensor([3, 23, 3, 0]),
    )  # fmt: skip


def test_documented_results(device):
    """What the docstring promises of rows that are not finite, on every backend."""
    x = peculiar()
    for method in METHODS:
        facts = categorical_sample_with_stats(x, method=method, key=randfuse.key(0))
        assert facts.tokens[:3].tolist() == [0, 0, 3], "NaN row, -inf row, the first +inf"
        assert facts.tokens[5] == 77
        assert facts.tokens[6] >= 1024
        assert facts.tokens[8] == 1
        expected = torch.logsumexp(x.double(), -1).float()
        torch.testing.assert_close(facts.logsumexp, expected, equal_nan=True)
        for fact in facts[1:5]:
            assert fact[:2].isnan().all(), "no support"
            assert not fact[2:].isnan().any()
        assert facts.logprob[[2, 5, 8]].tolist() == [0, 0, 0]
        assert facts.log_odds[[2, 5]].tolist() == [INF, INF]


def test_greedy_takes_the_lowest_of_equals(device):
    x = torch.zeros(3, 3000)
    x[1, [1500, 2999]] = 1.0
    x[2, 0] = -1.0
    for method in METHODS:
        assert categorical_sample(x, 0.0, method=method).tolist() == [0, 1500, 1]


def test_top_k_keeps_exactly_k_and_top_p_the_crossing_token(device):
    key = randfuse.key(5)
    x = torch.zeros(1, 100)  # all equal: ties go to the lowest index
    drawn = categorical_sample(x, top_k=7, num_samples=300, key=key).unique()
    assert drawn.tolist() == list(range(7))
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.951, 4)):
        drawn = categorical_sample(p, top_p=top_p, num_samples=300, key=key).unique()
        assert drawn.tolist() == list(range(kept)), f"top_p={top_p}"
    drawn = categorical_sample(p, min_p=0.29, num_samples=300, key=key).unique()
    assert drawn.tolist() == [0, 1, 2]
    drawn = categorical_sample(p, top_k=2, top_p=0.6, num_samples=300, key=key).unique()
    assert drawn.tolist() == [0], "top_p sees what top_k left: 0.5 of 0.8 reaches 0.6"


@pytest.mark.parametrize("method", METHODS)
def test_a_row_depends_on_nothing_but_itself(device, method):
    """Not on other rows, their order, selection, threads, instruction set, or the number of draws."""
    x, keys = peculiar(40), randfuse.split(randfuse.key(8), 40)
    whole = categorical_sample(x, num_samples=3, method=method, key=keys, top_p=0.97)
    order = torch.randperm(40)
    assert_bitwise_equal(categorical_sample(x[order], num_samples=3, method=method, key=keys[order], top_p=0.97),
                         whole[order], name="order")  # fmt: skip
    assert_bitwise_equal(categorical_sample(x, num_samples=3, method=method, key=keys, top_p=0.97, rows=order[:5]),
                         whole[order[:5]], name="rows")  # fmt: skip
    assert_bitwise_equal(categorical_sample(x, method=method, key=keys, top_p=0.97), whole[:, 0], name="first draw")
    one_key = categorical_sample(x, method=method, key=keys[0])
    shard = categorical_sample(x[7:], method=method, key=keys[0], row_offset=7)
    assert_bitwise_equal(shard, one_key[7:], name="row_offset")
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert_bitwise_equal(categorical_sample(x, num_samples=3, method=method, key=keys, top_p=0.97), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree(dtype):
    from randfuse import _C

    x, key, best = (torch.randn(64, 5000) * 4).to(dtype), randfuse.key(6), _C.build_info()["isa"]
    x[0, :3000] = -INF
    x[1, 4000] = NAN
    try:
        for method in METHODS:
            found = []
            for isa in ("baseline", "avx2", best):
                _C.cap_isa(isa)
                found.append(categorical_sample(x, 0.9, method=method, key=key, num_samples=4, top_p=0.99))
                assert_same("cpu", x[:8], 0.9, method=method, key=key)
            assert_bitwise_equal(found[0], found[2], name="baseline")
            assert_bitwise_equal(found[1], found[2], name="avx2")
    finally:
        _C.cap_isa(best)


@pytest.mark.parametrize("layout", ["shifted", "transposed", "expanded", "every other row"])
def test_any_strides(device, layout):
    base = torch.randn(4, 6, 1500)
    x = {
        "shifted": base[:, :-1],
        "transposed": base.permute(1, 2, 0),
        "expanded": base[:1].expand(5, 6, 1500),
        "every other row": base[:, ::2, 3:1203],
    }[layout]
    key = randfuse.key(1)
    for method in METHODS:
        assert_bitwise_equal(categorical_sample(x, method=method, key=key),
                             categorical_sample(x.contiguous(), method=method, key=key))  # fmt: skip


def test_more_than_2_to_31_logits():
    """The last rows of 4 GiB, of which only those that are read get pages."""
    vocab = 2**20
    x = torch.empty(2**11 + 3, vocab, dtype=torch.bfloat16)
    rows = torch.tensor([2**11 + 2, 0, 2**11])
    x[rows] = -INF
    x[rows, [vocab - 1, 5, 0]] = 0.0
    for method in METHODS:
        assert categorical_sample(x, method=method, rows=rows).tolist() == [vocab - 1, 5, 0]


def test_empty_batches(device):
    assert categorical_sample(torch.empty(0, 5)).shape == (0,)
    assert categorical_sample(torch.empty(2, 0, 5), num_samples=4).shape == (2, 0, 4)
    facts = categorical_sample_with_stats(torch.ones(3, 5), rows=torch.empty(0, dtype=torch.int64), num_samples=2)
    assert [tuple(f.shape) for f in facts] == [(0, 2), (0, 2), (0, 2), (0,), (0,), (0,)]
    assert categorical_sample(torch.ones(5)).shape == ()


def test_calls_without_key_differ_and_follow_manual_seed(device):
    x = torch.zeros(64, 1000)
    torch.manual_seed(1)
    a, b = categorical_sample(x), categorical_sample(x)
    torch.manual_seed(1)
    assert not torch.equal(a, b)
    assert torch.equal(a, categorical_sample(x))
    assert (categorical_sample(x, num_samples=2)[:, 0] != categorical_sample(x, num_samples=2)[:, 1]).any()


def merged(winners):
    tokens, score = winners[0]
    for winner in winners[1:]:
        tokens, score = torch.where(winner.score > score, winner.tokens, tokens), torch.maximum(score, winner.score)
    return tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("shards", [(2500,), (4, 2496), (1024, 1024, 452), (1300, 100, 1100)])
def test_shards_of_a_race_merge_to_the_whole(device, shards, temperature):
    x, u, key = peculiar(vocab=2500), torch.randn(12, 2500), randfuse.split(randfuse.key(3), 12)
    shared = {"key": key, "exclude": torch.tensor([2499, 1100, 1300, 3, 7]), "num_samples": 3, "row_offset": 5}
    shared |= {
        "temperature": temperature,
        "rows": torch.tensor([11, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]),
        "cfg_scale": 0.5,
    }
    whole = categorical_sample(x, method="race", uncond_logits=u, **shared)
    parts, at = [], 0
    for width in shards:
        columns = slice(at, at + width)
        parts.append(categorical_race(x[:, columns], uncond_logits=u[:, columns], col_offset=at, **shared))
        at += width
    assert_bitwise_equal(merged(parts), whole)


def test_a_shard_has_the_bitmask_of_its_columns(device):
    x, key = torch.randn(7, 1500), randfuse.key(2)
    bits = torch.randint(-(2**31), 2**31 - 1, (7, 47), dtype=torch.int32)
    left = categorical_race(x[:, :640], bitmask=bits[:, :20], key=key)
    right = categorical_race(x[:, 640:], bitmask=bits[:, 20:], key=key, col_offset=640)
    assert_bitwise_equal(merged([left, right]), categorical_sample(x, method="race", bitmask=bits, key=key))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_those_of_float64(kernels_device, dtype):
    """Both words of a race count: the low one changes a score by 2**-32 of itself, a thousand tolerances."""
    x = peculiar(vocab=1100).to(dtype)
    for col_offset in (0, 2**34 - 1104):
        args = {"num_samples": 40, "key": randfuse.key(6), "row_offset": 2**32 - 12, "col_offset": col_offset}
        got, expected = categorical_race(x, 0.9, **args), reference(categorical_race, x, 0.9, **args)
        assert_bitwise_equal(got.tokens, expected.tokens)
        torch.testing.assert_close(got.score, expected.score, rtol=0, atol=3e-13)
        assert got.score[1].eq(-INF).all(), "no token is allowed"
        assert got.tokens[1].eq(col_offset).all(), "no token is allowed"


@pytest.mark.parametrize("method", METHODS)
def test_vmap(kernels_device, method):
    """A shared key draws the same for each element, a batch of keys its own; every other argument may be batched."""
    x, key = torch.randn(3, 2, 5, 90), randfuse.key(4)
    keys, rows, heat = randfuse.split(key, 3), torch.tensor([[4, 0], [9, 9], [3, 2]]), torch.rand(3, 2, 5)
    bits = torch.randint(-(2**31), 2**31 - 1, (3, 10, 3), dtype=torch.int32)

    def draw(x, key, heat, top_p, bits, rows, uncond):
        facts = categorical_sample_with_stats(
            x, heat, top_p=top_p, bitmask=bits, rows=rows, uncond_logits=uncond, cfg_scale=1.0, num_samples=2,
            exclude=torch.tensor([0, 1]), key=key, method=method,
        )  # fmt: skip
        return *facts, *categorical_race(x, heat, key=key), categorical_sample(x, heat, method=method, key=key)

    batched = (x, keys, heat, torch.rand(3), bits, rows, x.flip(0))
    for in_dims in (
        (0,) * 7,
        (0, None, None, 0, None, None, None),
        (None, 0, 0, None, 0, None, None),
        (1, 0, 0, 0, 0, 0, 1),
    ):
        args = [b if d is not None else b[0] for b, d in zip(batched, in_dims, strict=True)]
        args = [b.movedim(0, d) if d else b for b, d in zip(args, in_dims, strict=True)]
        got = torch.vmap(draw, in_dims=in_dims)(*args)
        for b in range(3):
            own = [a if d is None else a.select(d, b) for a, d in zip(args, in_dims, strict=True)]
            for whole, part in zip(got, draw(*own), strict=True):
                assert_bitwise_equal(whole[b], part, name=str(in_dims))


def test_vmap_randomness_of_a_drawn_key_and_an_empty_batch(kernels_device):
    x = torch.zeros(3, 50, 40)
    same = torch.vmap(categorical_sample, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(categorical_sample, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    assert torch.vmap(lambda x: categorical_sample(x, key=randfuse.key(0)))(x[:0]).shape == (0, 50)


def test_vmap_refuses_a_batch_of_exclusions(kernels_device):
    with pytest.raises(ValueError, match="^categorical_sample: exclude must be the same for the whole batch"):
        torch.vmap(lambda e: categorical_sample(torch.ones(2, 5), exclude=e, key=randfuse.key(0)))(
            torch.ones(3, 1).long()
        )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_facts_are_as_accurate_as_pytorch(kernels_device, temperature):
    x, key = torch.randn(64, 50257) * 3, randfuse.key(2)
    facts = categorical_sample_with_stats(x, temperature, key=key)
    exact = reference(categorical_sample_with_stats, x.double(), temperature, key=key)
    assert_bitwise_equal(facts.tokens, exact.tokens)
    scaled = x / temperature
    log_p = scaled.log_softmax(-1)
    plain = {
        "logprob": log_p.gather(-1, facts.tokens.unsqueeze(-1)).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logsumexp": scaled.logsumexp(-1),
    }
    for name, value in plain.items():
        assert_close_to_float64(getattr(facts, name), getattr(exact, name), value, name=name)


def test_confidence_does_not_saturate(device):
    """20 positions with 1 - p from 1e-9 to 1e-28: float32 probabilities are all 1, log-odds and margins still rank."""
    x = torch.zeros(20, 1000)
    x[:, 500] = torch.linspace(math.log(999e9), math.log(999e28), 20)
    facts = categorical_sample_with_stats(x, 0.0)
    assert (torch.softmax(x, -1).amax(-1) == 1).all()
    for fact in (facts.log_odds, facts.margin, -facts.entropy):
        assert (fact.diff() > 0).all()
    torch.testing.assert_close(facts.log_odds, x[:, 500] - math.log(999))
    p = x.double().softmax(-1)
    torch.testing.assert_close(facts.margin[0].double(), 2 * torch.atanh(p[0, 500] - p[0, 0]), rtol=1e-4, atol=0)


def test_no_gradient_flows(device):
    x = torch.randn(3, 50, requires_grad=True)
    facts = categorical_sample_with_stats(x)
    assert not any(f.requires_grad for f in facts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_as_one_graph(backend, method):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x, key, temperature):
        facts = categorical_sample_with_stats(x, temperature, method=method, key=key, top_p=0.9, num_samples=2)
        return facts.tokens, facts.entropy

    with use_backend(backend):
        compiled = torch.compile(step, backend=counter, fullgraph=True)
        for seed in range(6):
            args = torch.randn(5, 40), randfuse.key(seed), torch.tensor(0.2 * (seed + 1))
            for a, b in zip(compiled(*args), step(*args), strict=True):
                assert_bitwise_equal(a, b)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


ERRORS = [
    ({"logits": [1.0]}, TypeError, "logits must be a Tensor, got list"),
    ({"logits": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "logits must be float32.*, got torch.int32"),
    ({"logits": torch.tensor(1.0)}, ValueError, r"logits must have shape \(…, V\) with V in \[1, 2\*\*20\], got \(\)"),
    ({"logits": torch.ones(2, 0)}, ValueError, r"logits must have shape .*, got \(2, 0\)"),
    ({"logits": torch.ones(1).expand(2, 2**20 + 1)}, ValueError, "logits must have shape .*, got"),
    ({"temperature": -1.0}, ValueError, r"temperature must be 0 or in .*, got -1.0"),
    ({"temperature": NAN}, ValueError, "temperature must be 0 or in .*, got nan"),
    ({"temperature": 1e-40}, ValueError, "temperature must be 0 or in .*, got 1e-40"),
    ({"temperature": INF}, ValueError, "temperature must be 0 or in .*, got inf"),
    ({"temperature": "1"}, TypeError, "temperature must be a number or a Tensor, got str"),
    ({"temperature": None}, TypeError, "temperature must be a number or a Tensor, got None"),
    ({"temperature": torch.tensor([1.0, 2.0])}, ValueError, r"temperature must have shape \(\) or \(4,\), got \(2,\)"),
    ({"temperature": torch.tensor([1.0, 2.0, -3.0, 1.0])}, ValueError, "temperature must be 0 or in .*, got -3.0"),
    ({"temperature": torch.tensor(1)}, TypeError, "temperature must be floating, got torch.int64"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k": 1.5}, TypeError, "top_k must be an int or a Tensor, got float"),
    ({"top_k": torch.tensor(-1)}, ValueError, "top_k must be at least 1, got -1"),
    ({"top_p": 1.5}, ValueError, r"top_p must be in \[0, 1\], got 1.5"),
    ({"top_p": NAN}, ValueError, r"top_p must be in \[0, 1\], got nan"),
    ({"min_p": -0.1}, ValueError, r"min_p must be in \[0, 1\], got -0.1"),
    ({"num_samples": 0}, ValueError, r"num_samples must be in \[1, 2\*\*32\), got 0"),
    ({"num_samples": 1.0}, TypeError, "num_samples must be an int or None, got float"),
    ({"exclude": [1]}, TypeError, "exclude must be a Tensor, got list"),
    ({"exclude": torch.tensor([5])}, ValueError, r"exclude must be in \[0, 5\), got 5"),
    ({"exclude": torch.tensor([0, -1])}, ValueError, r"exclude must be in \[0, 5\), got -1"),
    ({"exclude": torch.tensor(1)}, ValueError, "exclude must have one dimension"),
    ({"exclude": torch.tensor([1.0])}, TypeError, "exclude must be torch.int64, got torch.float32"),
    ({"rows": torch.tensor([4])}, ValueError, r"rows must be in \[0, 4\), got 4"),
    ({"bitmask": torch.ones(4, 2, dtype=torch.int32)}, ValueError, r"bitmask must have shape .* = \(4, 1\)"),
    ({"bitmask": torch.ones(4, 1)}, TypeError, "bitmask must be torch.int32, got torch.float32"),
    ({"uncond_logits": torch.ones(4, 4)}, ValueError, "uncond_logits must have shape"),
    ({"uncond_logits": torch.ones(4, 5).half()}, TypeError, "uncond_logits must be torch.float32, got torch.float16"),
    ({"cfg_scale": INF}, ValueError, "cfg_scale must be a finite number, got inf"),
    ({"method": "gumbel"}, ValueError, "method must be 'cdf' or 'race', got 'gumbel'"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
    ({"row_offset": 2**32}, ValueError, "row_offset must be in"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), ERRORS)
def test_errors(device, kwargs, error, message):
    with pytest.raises(error, match=f"^categorical_sample: {message}"):
        categorical_sample(**{"logits": torch.ones(4, 5), **kwargs})


def test_errors_of_a_shard(device):
    for value, message in (
        (6, r"a multiple of 4 in \[0, 2\*\*34 - V\], got 6"),
        (2**34, "a multiple of 4"),
        (-4, "in "),
    ):
        with pytest.raises(ValueError, match=f"^categorical_race: col_offset must be {message}"):
            categorical_race(torch.ones(4, 5), col_offset=value)
    with pytest.raises(ValueError, match=r"^categorical_race: exclude must be in \[0, 17179869184\), got -1"):
        categorical_race(torch.ones(4, 5), exclude=torch.tensor([-1]))
