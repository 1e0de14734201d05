"""Section 3 of docs/streams.md, sketches, in scalar Python integers against the ops, beyond 2^32 blocks too."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from randfuse import _extension
from randfuse.ops.dense_sketch import dense_sketch_entries
from randfuse.ops.distinct_rows import distinct_rows
from randfuse.ops.sparse_sketch import sparse_sketch_entries
from randfuse.sketch import sampling

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

K = 0xF88F077046DA5BE3  # fold_in(42, 0)
KEY = torch.tensor([K - 2**64])


def lane(column: int, s: int, op: int, width: int) -> int:
    block, place = divmod(column, 128 // width)
    rounds = 7 if width <= 16 else 10
    domain = 1 << 24 | op << 8 | width.bit_length() - 1
    j, i = block % 2**32, block >> 32
    words = _extension.module().philox4x32(rounds, j, i, s, domain, K % 2**32, K >> 32)
    whole = sum(word << 32 * t for t, word in enumerate(words))
    return whole >> place * width & (1 << width) - 1


def float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


@pytest.mark.parametrize("first", [0, 2**34 - 3, 2**61 + 5])
def test_nonzeros(first):
    d, nnz = 1000, 3
    rows, signs = sparse_sketch_entries(KEY, d, nnz, first, 9)
    for t in range(nnz):
        low, high = t * d // nnz, (t + 1) * d // nnz
        for c in range(9):
            word = lane(first + c, t, 17, 32)
            assert rows[0, t, c] == low + ((word >> 1) * (high - low) >> 31), (
                f"row of nonzero {t} of column {first + c}"
            )
            assert signs[0, t, c] == (-1 if word & 1 else 1), f"sign of nonzero {t} of column {first + c}"


@pytest.mark.parametrize("first", [0, 2**39 - 5, 2**61 + 5])
def test_signs(first):
    got = dense_sketch_entries(KEY, "rademacher", (5, 7), first, 9)[0]
    for r in range(2):
        assert got[r].tolist() == [1.0 - 2 * lane(first + c, 5 + r, 16, 1) for c in range(9)]


@pytest.mark.parametrize("first", [0, 2**34 - 20, 2**61 + 5])
def test_normals(first):
    got = dense_sketch_entries(KEY, "gaussian", (5, 6), first, 40)[0, 0]
    for c in range(first, first + 40):
        group, place = divmod(c, 32)
        w, turn = (lane(32 * group + place % 16 + shift, 5, 18, 32) for shift in (0, 16))
        radius = math.sqrt(-2 * math.log(float32(w | 1) * 2**-32))
        x = turn % 2**30 - (2**30 if turn % 2**30 >= 2**29 else 0)
        angle = math.pi / 2 * ((turn >> 30) + float32(x) * 2**-30)
        expected = radius * (math.cos(angle) if place < 16 else math.sin(angle))
        assert math.isclose(got[c - first], expected, rel_tol=2.4e-7), f"normal of column {c}"


@pytest.mark.parametrize("substream", [0, 1])
def test_permutation(substream):
    places = list(range(1000))
    for t in range(100):
        other = t + (lane(t, substream, 19, 64) * (1000 - t) >> 64)
        places[t], places[other] = places[other], places[t]
    assert distinct_rows(KEY, substream, 1000, 100)[0].tolist() == places[:100]


def word(row: int, role: int) -> int:
    words = _extension.module().philox4x32(10, row % 2**32, row >> 32, role, 1 << 24 | 20 << 8 | 6, K % 2**32, K >> 32)
    return words[0] | words[1] << 32


def pivotal(units: list[int]) -> set[int]:
    """Drawn places, by the rules of duels in integers and floats."""
    drawn, left, level = set(), list(enumerate(units)), 0
    while len(left) > 1:
        on = []
        for r in range(len(left) // 2):
            (i, a), (j, b) = left[2 * r : 2 * r + 2]
            coin = float(word(r, 3 + level) >> 11) * 2.0**-53
            if a + b <= 2**32:
                on.append((j if coin * (a + b) < b else i, a + b))
            else:
                right_on = coin * (2**33 - a - b) < 2**32 - b
                drawn.add(i if right_on else j)
                on.append((j if right_on else i, a + b - 2**32))
        left, level = on + left[2 * len(on) :], level + 1
    return drawn | {i for i, p in left if p == 2**32}


def test_row_sampling():
    m, k = 101, 23
    weights = torch.arange(1, m + 1, dtype=torch.float64) ** 2
    units = sampling._units("test", weights, k)
    one, key = 2**32, KEY.squeeze(0)
    kept = {method: sampling.sample_rows(weights, k, method=method, key=key).indices for method in sampling.DRAWS}
    assert kept["independent"].tolist() == [r for r in range(m) if word(r, 0) >> 32 < units[r]]
    signed = lambda w: w - 2**64 * (w >> 63)  # noqa: E731
    order = sorted(range(m), key=lambda r: signed(word(r, 2)))
    in_order = units[order].tolist()
    c, u, systematic = 0, word(0, 1) >> 32, []
    for r, q in zip(order, in_order, strict=True):
        systematic += [r] * ((c + q - 1 - u) // one - (c - 1 - u) // one)
        c += q
    assert kept["systematic"].tolist() == sorted(systematic)
    assert kept["pivotal"].tolist() == sorted(order[i] for i in pivotal(in_order))
    assert len(kept["pivotal"]) == k
    far = torch.tensor([2**33 + 5])
    assert sampling._words(KEY, 0, far).tolist() == [signed(word(2**33 + 5, 0))], "beyond 2^32 rows"
