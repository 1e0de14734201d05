"""kept_blocks: the words of the stream decide, exactly k, all subsets alike, and the law of k.

Keys are fixed, so nothing here is flaky; the false-positive rates are those of a fresh set of keys.
"""

from __future__ import annotations

import itertools

import pytest
import randfuse
import torch
from randfuse import _backends
from randfuse.ops import kept_blocks
from randfuse.reference import streams
from randfuse.reference.kept_blocks import BLOCKS, COLUMNS, smallest

DRAWS = 20_000


@pytest.fixture
def device(device):
    if _backends._forced == "cuda":
        pytest.skip("no CUDA kernel, by design")
    return device


@pytest.mark.parametrize("role", [COLUMNS, BLOCKS])
@pytest.mark.parametrize(("n", "kept", "coin"), [(1, 0, 2**31), (7, 3, 2**30), (50, 50, 0), (50, 0, 0), (300, 30, 0)])
def test_the_smallest_words_stay(device, n, kept, coin, role):
    """Against the definition in docs/streams.md, spelled out: lanes of domain 4, sorted as (lane, index)."""
    key, rows, offset = -(2**40) + 7, 5, 2**32 - 5
    got = kept_blocks.draw(torch.tensor(key, device=device), rows, n, kept, coin, role, offset).cpu()
    assert got.shape == (1, rows, kept + (coin > 0))
    stream = {"op": 4, "width": 32, "rounds": 10}
    keys, i = torch.full((rows,), key), torch.arange(offset, offset + rows)
    words = streams.lanes(keys, i, torch.arange(n), sample=2 * role, **stream).tolist()
    coins = streams.lanes(keys, i, torch.zeros(1, dtype=torch.int64), sample=2 * role + 1, **stream).tolist()
    for r in range(rows):
        k = kept + (coins[r][0] < coin)
        order = sorted(range(n), key=lambda j, row=words[r]: (row[j], j))
        assert got[0, r].tolist() == sorted(order[:k]) + [n] * (got.shape[-1] - k), f"row {r}"


def test_ties_go_to_the_lowest_index():
    words, no_coin = torch.tensor([[5, 1, 5, 5, 0]]), torch.zeros(1, 1, dtype=torch.int64)
    assert smallest(words, no_coin, 3, 0).tolist() == [[0, 1, 4]]
    assert smallest(words, no_coin + 9, 3, 9).tolist() == [[0, 1, 4, 5]], "the coin must be below, not at, its bound"
    assert smallest(words, no_coin + 8, 3, 9).tolist() == [[0, 1, 2, 4]]


def test_slices_and_keys(device):
    key = randfuse.key(5, device)
    whole = kept_blocks.draw(key, 9, 11, 4, 7, BLOCKS)
    assert torch.equal(kept_blocks.draw(key, 5, 11, 4, 7, BLOCKS, 4), whole[:, 4:]), "a slice of rows"
    keys = randfuse.split(key, 3)
    together = kept_blocks.draw(keys, 9, 11, 4, 7, BLOCKS)
    for g in range(3):
        assert torch.equal(together[g], kept_blocks.draw(keys[g], 9, 11, 4, 7, BLOCKS)[0]), f"key {g}"
    assert torch.equal(torch.vmap(lambda k: kept_blocks.draw(k, 9, 11, 4, 7, BLOCKS))(keys)[:, 0], together)


def chi_squared(role):
    """Of the ten subsets of two out of five, over fresh keys."""
    chosen = kept_blocks.draw(torch.arange(DRAWS), 1, 5, 2, 0, role)[:, 0]
    counts = [int((chosen == torch.tensor(s)).all(-1).sum()) for s in itertools.combinations(range(5), 2)]
    assert sum(counts) == DRAWS, "every draw must be one of the ten subsets"
    return sum((c - DRAWS / 10) ** 2 for c in counts) / (DRAWS / 10)


@pytest.mark.parametrize("role", [COLUMNS, BLOCKS])
def test_all_subsets_alike(device, role):
    """chi²(9) > 45 once in 10⁶; a subset that is 10 % too frequent gives 220 on average."""
    assert chi_squared(role) < 45


def test_all_subsets_alike_fails_where_they_are_not():
    """Negative control: choosing a first block and its neighbour is uniform over blocks, not over subsets."""
    first = torch.randint(5, (DRAWS,))
    pairs = torch.stack((first, (first + 1) % 5), -1).sort(-1).values
    counts = [int((pairs == torch.tensor(s)).all(-1).sum()) for s in itertools.combinations(range(5), 2)]
    assert sum((c - DRAWS / 10) ** 2 for c in counts) / (DRAWS / 10) > 45


@pytest.mark.parametrize(("p", "n"), [(0.1, 6), (0.05, 6), (0.5, 7), (0.999, 8), (1e-3, 3)])
def test_the_number_kept_is_right_on_average(device, p, n):
    """Within five standard errors (1 in 2·10⁶), where plain rounding would be off by up to half a block."""
    kept, coin, scale = kept_blocks.choice(p, n)
    expected = kept + coin / 2**32
    assert abs(expected - (1 - p) * n) <= 2**-33 + 1e-15 * n
    assert scale == pytest.approx(n / expected, rel=1e-15), "the scale must be that of the law as drawn"
    counts = (kept_blocks.draw(torch.arange(DRAWS, device=device), 1, n, kept, coin, BLOCKS) < n).sum(-1).double()
    assert set(counts.flatten().tolist()) <= {kept, kept + 1}
    share = coin / 2**32
    assert abs(float(counts.mean()) - expected) <= 5 * (share * (1 - share) / DRAWS) ** 0.5 + 1e-9


def test_choice_at_the_ends():
    assert kept_blocks.choice(1.0, 5) == (0, 0, 0.0)
    assert kept_blocks.choice(1e-12, 5) == (5, 0, 1.0), "closer to 0 than the coin can tell: all stay"
    assert kept_blocks.choice(0.5, 0) == (0, 0, 0.0)
