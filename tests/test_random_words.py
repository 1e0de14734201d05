"""random_words: the known answers of the streams at coordinates of their own, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import randfuse
import torch
import torch._dynamo.testing
from randfuse import keys, reference
from randfuse.ops.random_words import random_words
from randfuse.reference import streams
from randfuse.testing import known_answers

ANSWERS = known_answers(Path(__file__).parent / "kat" / "streams.txt")
FULL = 2**63 - 1


def signed(value: int) -> int:
    return value - 2**64 if value >> 63 else value


def test_known_answers(device):
    """Random123's vectors of ten rounds: counter words c0 to c3 are both halves of number, sample and domain."""
    seen = 0
    for answer in ANSWERS:
        if answer.kind == "philox" and answer.arguments[0] == 10:
            _, c0, c1, c2, c3, k0, k1 = answer.arguments
            at = [torch.tensor([signed(v)], device=device) for v in (k1 << 32 | k0, c1 << 32 | c0, c2)]
            got = [int(w) % 2**64 for w in random_words(*at, c3)]
            r0, r1, r2, r3 = answer.answers
            assert got == [r1 << 32 | r0, r3 << 32 | r2], answer
            seen += 1
        if answer.kind == "fold_in":
            key, data = (torch.tensor(signed(v), device=device) for v in answer.arguments)
            assert int(randfuse.fold_in(key, data)) % 2**64 == answer.answers[0], answer
            seen += 1
    assert seen == 6


@pytest.mark.parametrize("n", [0, 1, 7, 20_000])
def test_equals_reference(kernels_device, n):
    """Ragged ends of vectors, and more than a task."""
    key, number, sample = (torch.randint(-FULL, FULL, (n,)) for _ in range(3))
    got = random_words(*(x.to(kernels_device) for x in (key, number, sample)), 0xFEDCBA98)
    expected = reference.FUNCTIONS["random_words"](key, number, sample, 0xFEDCBA98)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b)


def test_broadcasting_strides_and_batches(device):
    key, number = torch.randint(-FULL, FULL, (3, 1), device=device), torch.arange(5, device=device)
    step = torch.tensor(7, device=device)
    low, high = random_words(key, number, step, 9)
    for b in range(3):
        own = random_words(key[b, 0].expand(5), number, step.expand(5), 9)
        assert torch.equal(low[b], own[0]), f"key {b}"
        assert torch.equal(high[b], own[1]), f"key {b}"
    turned = random_words(key.expand(3, 5).t(), number.unsqueeze(1), step, 9)
    assert torch.equal(turned[0], low.t()), "data that do not lie one after the other"
    batched = torch.vmap(lambda k, n: random_words(k, n, step, 9), in_dims=(0, None))(key.squeeze(1), number)
    assert torch.equal(batched[0], low), "vmap"
    swapped = torch.vmap(lambda n: random_words(key.squeeze(1), n, step, 9)[1])(number)
    assert torch.equal(swapped, high.t()), "vmap over another argument"


def test_compiles_as_one_graph(device):
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = torch.compile(lambda key, data: keys.split(keys.fold_in(key, data), 3), backend=count, fullgraph=True)
    for seed in range(4):
        key, data = randfuse.key(seed, device), torch.arange(seed, seed + 2, device=device)
        assert torch.equal(f(key, data), keys.split(keys.fold_in(key, data), 3))
    assert count.frame_count == 1


def test_derived_keys_are_those_of_the_streams(device):
    key, data = torch.randint(-FULL, FULL, (4, 1), device=device), torch.tensor([0, -1, 2**40, FULL], device=device)
    expected = streams.fold_in(key.expand(4, 4), data.expand(4, 4))
    assert torch.equal(randfuse.fold_in(key, data), expected)
    assert torch.equal(randfuse.fold_in(key, 2**40), expected[:, 2:3])
    assert torch.equal(randfuse.split(key[:, 0], 3)[2], streams.fold_in(key[2].expand(3), torch.arange(3).to(device)))
