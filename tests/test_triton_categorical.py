"""Categorical sampling on the Triton backend against the reference; where and how it runs: test_triton.py."""

import pytest
import randfuse
import torch
from randfuse import categorical_race, categorical_sample, categorical_sample_with_stats, reference
from randfuse.reference import streams
from test_categorical_sample import merged, peculiar
from test_triton import (
    DTYPES,
    on_device,
    op,
    pytestmark,  # noqa: F401  the interpreter's warnings
    same_bits,
)

METHODS = ["cdf", "race"]


def assert_same(x, temperature, method, **kwargs):
    """Tokens of the reference, facts within float32; the two ops agree."""
    with randfuse.use_backend("reference"):
        expected = categorical_sample_with_stats(x, temperature, method=method, **kwargs)
    with randfuse.use_backend("triton"):
        got = categorical_sample_with_stats(x, temperature, method=method, **kwargs)
        alone = categorical_sample(x, temperature, method=method, **kwargs)
    same_bits(got.tokens, expected.tokens, "tokens")
    same_bits(alone, expected.tokens, "tokens without facts")
    for name, a, b in zip(got._fields[1:], got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@on_device
@pytest.mark.parametrize(("method", "dtype"), [*(("cdf", dtype) for dtype in DTYPES), ("race", torch.bfloat16)])
def test_rows_of_every_kind(device, dtype, method):
    x = peculiar(10, 1300).to(device, dtype)  # two tiles, the second ragged
    assert_same(x, 0.7, method, num_samples=2, key=randfuse.key(1, device))


@on_device
@pytest.mark.parametrize(("method", "filters"), [
    ("cdf", {"top_k": 50}), ("cdf", {"top_p": 0.9}), ("cdf", {"top_p": 0.0}), ("race", {"min_p": 0.05}),
    ("race", {"top_k": 300, "top_p": 0.95, "min_p": 0.01}),
], ids=str)  # fmt: skip
def test_filters(device, method, filters):
    x = peculiar(10, 1100)[[1, 3, 4, 7, 8]].to(device)
    assert_same(x, 0.8, method, key=randfuse.key(4, device), **filters)


@on_device
@pytest.mark.parametrize("method", METHODS)
def test_all_arguments_at_once(device, method):
    n, vocab = 6, 1500
    x, u = (torch.randn(2, 3, vocab, device=device) * 3 for _ in range(2))
    bits = torch.randint(-(2**31), 2**31 - 1, (n, 47), dtype=torch.int32, device=device)
    assert_same(
        x, torch.tensor([[0.0, 0.5, 1.0], [2.0, 1.5, 0.1]], device=device), method, num_samples=2,
        key=randfuse.split(randfuse.key(0, device), n), top_k=torch.randint(1, 200, (2, 3), device=device),
        top_p=torch.rand(2, 3, device=device), min_p=torch.rand(2, 3, device=device) * 0.1,
        exclude=torch.tensor([1499, 0, 1024, 7, 7], device=device), uncond_logits=u, cfg_scale=1.5, row_offset=2**31,
        bitmask=bits, rows=torch.tensor([3, 5, 3, 0], device=device),
    )  # fmt: skip


@on_device
def test_only_float64_sums_decide_at_an_edge(device):
    """Rows whose first tile ends 1e-9 from where their coin falls, which float32 sums cannot see."""
    key, rows = randfuse.key(7, device), torch.arange(16, device=device)
    low, high, _, _ = streams.block(key.expand(16), rows, 0, op=streams.CATEGORICAL, width=32, sample=0)
    u = ((high << 21) | (low >> 11)).double() * 2.0**-53
    odds, tile = ((1 - u) / u).log(), torch.randn(16, 1024, device=device)
    tile = (tile - (tile.double().logsumexp(-1) + odds).unsqueeze(-1)).float()
    last = tile.double().logsumexp(-1) + odds + torch.where(rows % 2 == 0, 1e-9, -1e-9)
    assert_same(torch.cat([tile, last.float().unsqueeze(-1)], -1), 1.0, "cdf", key=key)


@on_device
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_shards_of_a_race_merge_to_the_whole(device, temperature):
    x, shared = peculiar(10, 1500).to(device), {"key": randfuse.key(3, device), "num_samples": 2}
    shared |= {"exclude": torch.tensor([1300, 3, 7], device=device), "temperature": temperature}
    with randfuse.use_backend("triton"):
        parts = [categorical_race(x[:, a:b], col_offset=a, **shared) for a, b in ((0, 700), (700, 1024), (1024, 1500))]
        whole = categorical_sample(x, method="race", **shared)
    same_bits(merged(parts), whole, "tokens")
    with randfuse.use_backend("reference"):
        expected = categorical_race(x[:, 700:1024], col_offset=700, **shared)
    torch.testing.assert_close(parts[1].score, expected.score, rtol=0, atol=3e-13)


@on_device
def test_rows_that_do_not_exist_and_values_out_of_range(device):
    """What cannot be refused on a GPU has a result: checked where the launcher itself is called."""
    x, key, one = torch.randn(3, 40, device=device), randfuse.key(1, device), torch.ones((), device=device)
    rows = torch.tensor([0, 3, -1], device=device)
    tokens, *facts = op("categorical_sample_with_stats")(x, key, one, *[None] * 6, 0.0, rows, None, "cdf", 0)
    assert tokens.tolist()[1:] == [-1, -1]
    assert all(f[1:].isnan().all() for f in facts)
    assert not any(f[0].isnan() for f in facts)
    nan, plain = one * float("nan"), (0.0, None, None, "cdf", 0)
    greedy = op("categorical_sample")(x, key, nan, *[None] * 6, *plain)
    same_bits(greedy, x.argmax(-1), "a temperature of NaN counts as 0")
    drawn = op("categorical_sample")(x, key, one, None, nan, nan, *[None] * 3, *plain)
    same_bits(drawn, reference.FUNCTIONS["categorical_sample"](x, key, one, *[None] * 6, *plain), "NaN filters nothing")


@on_device
def test_empty_batches(device):
    with randfuse.use_backend("triton"):
        assert categorical_sample(torch.empty(0, 5, device=device)).shape == (0,)
        assert categorical_sample(torch.ones(5, device=device), num_samples=3).shape == (3,)


@on_device
def test_random_words(device):
    key, number, sample = (torch.randint(-(2**63), 2**63 - 1, (300,), device=device) for _ in range(3))
    expected = reference.FUNCTIONS["random_words"](key, number, sample, 0xFEDCBA98)
    for got, words in zip(op("random_words")(key, number, sample, 0xFEDCBA98), expected, strict=True):
        same_bits(got, words, "words")
    with pytest.raises(ValueError, match="^random_words: number must have the shape of key"):
        op("random_words")(key, number[1:], sample, 0)
    with pytest.raises(TypeError, match="^random_words: key must be int64"):
        op("random_words")(key.int(), number, sample, 0)
    with pytest.raises(ValueError, match="^random_words: domain must be in"):
        op("random_words")(key, number, sample, -1)
