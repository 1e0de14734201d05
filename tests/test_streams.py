"""Known answers, keys, and the statistics that a correct implementation of the streams must have."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import randfuse
import torch
from randfuse import _extension
from randfuse.reference import streams
from randfuse.testing import known_answers

ANSWERS = known_answers(Path(__file__).parent / "kat" / "streams.txt")


def float64_bits(x: torch.Tensor) -> int:
    return int(x.double().view(torch.int64))


def signed(value: int) -> torch.Tensor:
    return torch.tensor(value - 2**64 if value >> 63 else value)


def compute(kind: str, a: tuple[int, ...], count: int) -> list[int]:
    """The reference's answer to one line of the file."""
    if kind == "philox":
        words = streams.philox4x32(*map(torch.tensor, a[1:5]), signed(a[6] << 32 | a[5]), a[0])
        return [int(w) for w in words]
    if kind == "domain":
        return [streams.domain_word(*a)]
    if kind == "fold_in":
        return [int(streams.fold_in(signed(a[0]), signed(a[1]))) % 2**64]
    if kind == "block":
        key, i, j, s, op, width, rounds = a
        counter = (j, i, s, streams.domain_word(op, width))
        return [int(w) for w in streams.philox4x32(*map(torch.tensor, counter), signed(key), rounds)]
    if kind == "exponential":
        return [float64_bits(streams.race_exponential(torch.tensor(a[0]), torch.tensor(a[1])))]
    if kind == "race":
        key, i, token, s = a
        high, low = (
            int(
                streams.lanes(signed(key), torch.tensor(i), torch.tensor([token]), op=op, width=32, rounds=10, sample=s)
            )
            for op in (streams.RACE_HIGH, streams.RACE_LOW)
        )
        return [high, low, *compute("exponential", (high, low), 1)]
    key, op, width, rounds, first, second = a[:6]
    if kind == "lanes":
        cols = torch.arange(second, second + count)
        return streams.lanes(signed(key), torch.tensor(first), cols, op=op, width=width, rounds=rounds).tolist()
    rows, cols = torch.arange(first), torch.arange(second)
    lanes = streams.lanes(signed(key).expand(first), rows, cols, op=op, width=width, rounds=rounds)
    return [int(hashlib.sha256(lanes.numpy().astype("<u4").tobytes()).hexdigest()[:32], 16)]


def agree(answer, got: list[int]) -> bool:
    off = [abs(a - b) for a, b in zip(got, answer.answers, strict=True)]
    if answer.kind in ("exponential", "race"):  # torch's logarithm may be an ulp off, and so may the kernels'
        off[-1] -= 2
    return max(off) <= 0


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: f"{a.kind}{a.arguments}")
def test_known_answers_reference(answer):
    got = compute(answer.kind, answer.arguments, len(answer.answers))
    assert agree(answer, got), f"{answer.kind}: got {got}"
    assert any(answer.answers), "an all-zero answer would let a broken harness pass"


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
def test_known_answers_extension():
    c = _extension.module()
    seen = 0
    for answer in ANSWERS:
        if answer.kind == "philox":
            assert list(c.philox4x32(*answer.arguments)) == list(answer.answers), answer
            seen += 1
        elif answer.kind == "fold_in":
            assert [c.fold_in(*answer.arguments)] == list(answer.answers), answer
            seen += 1
    assert seen >= 9, f"the file must hold philox and fold_in lines, got {seen}"


@pytest.mark.gpu
@pytest.mark.parametrize("answer", [a for a in ANSWERS if a.kind in ("philox", "fold_in", "block", "lanes")])
def test_known_answers_cuda(answer):
    """The device's answers; the questions are those of csrc/kernels/cuda/known_answers.h."""
    ask, a = _extension.module().cuda_known_answers, answer.arguments
    if answer.kind == "philox":
        got = ask(0, a[0], list(a[1:5]), a[6] << 32 | a[5], 0, 0, 1)
    elif answer.kind == "fold_in":
        words = ask(3, 10, [0] * 4, a[0], a[1], 0, 1)
        got = [words[1] << 32 | words[0]]
    elif answer.kind == "block":
        key, i, j, s, op, width, rounds = a
        got = ask(1, rounds, [j, i, s, streams.domain_word(op, width)], key, 0, 0, 1)
    else:
        key, op, width, rounds, row, first, count = a
        counter = [0, row, 0, streams.domain_word(op, width)]
        got = ask(2, rounds, counter, key, first, width.bit_length() - 1, count)[::4]
    assert list(got) == list(answer.answers)


MUTATIONS = {
    "row and column swapped": lambda f: lambda j, i, s, d, k, r: f(i, j, s, d, k, r),
    "key halves swapped": lambda f: lambda j, i, s, d, k, r: f(j, i, s, d, (k >> 32 & 0xFFFFFFFF) | k << 32, r),
    "words reversed": lambda f: lambda *a: f(*a)[::-1],
    "one round less": lambda f: lambda j, i, s, d, k, r: f(j, i, s, d, k, r - 1),
    "no domain": lambda f: lambda j, i, s, d, k, r: f(j, i, s, d * 0, k, r),
    "no sub-stream": lambda f: lambda j, i, s, d, k, r: f(j, i, s * 0, d, k, r),
    "key cut to 32 bits": lambda f: lambda j, i, s, d, k, r: f(j, i, s, d, k & 0xFFFFFFFF, r),
    "data cut to 32 bits": lambda f: lambda j, i, s, d, k, r: f(j, i if (d >> 8 & 0xFF).any() else i * 0, s, d, k, r),
    "low words of another domain": lambda f: lambda j, i, s, d, k, r: f(j, i, s, d + (d >> 8 == 0x10015), k, r),
    "linear index": lambda f: lambda j, i, s, d, k, r: f(j + 25 * i, i * 0, s, d, k, r),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_known_answers_kill_mutations(name, monkeypatch):
    """The control of the file itself: each plausible mistake must change an answer."""
    monkeypatch.setattr(streams, "philox4x32", MUTATIONS[name](streams.philox4x32))
    lines = [a for a in ANSWERS if a.kind not in ("domain",)]
    assert not all(agree(a, compute(a.kind, a.arguments, len(a.answers))) for a in lines), name


def test_keys():
    assert int(randfuse.key(2**64 - 1)) == -1
    assert randfuse.key(-1) == randfuse.key(2**64 - 1)
    k = randfuse.key(42)
    assert randfuse.fold_in(k, 0) != randfuse.fold_in(k, 1)
    assert randfuse.fold_in(k, 2**40 + 7) != randfuse.fold_in(k, 7), "all 64 bits of data count"
    assert randfuse.fold_in(randfuse.fold_in(k, 1), 2) != randfuse.fold_in(k, 3), "folding is no addition"
    assert torch.equal(randfuse.split(k, 5), torch.stack([randfuse.fold_in(k, i) for i in range(5)]))
    assert randfuse.split(randfuse.split(k, 3), 4).shape == (3, 4)
    assert randfuse.split(k, 10_000).unique().numel() == 10_000


def test_draw_key_follows_the_generator():
    torch.manual_seed(3)
    a, b = randfuse.draw_key(), randfuse.draw_key()
    torch.manual_seed(3)
    assert a == randfuse.draw_key()
    assert a != b
    g = torch.Generator().manual_seed(5)
    assert randfuse.draw_key(generator=g) == randfuse.draw_key(generator=torch.Generator().manual_seed(5))
    drawn = torch.stack([randfuse.draw_key() for _ in range(256)])
    for half in (drawn >> 32, drawn & 0xFFFFFFFF):
        bits = half.unsqueeze(-1) >> torch.arange(32) & 1
        assert (bits.double().mean(0) - 0.5).abs().max() < 6 * 0.5 / 256**0.5, "every bit of a drawn key is random"


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0, 0.5 / 65536, 1.5 / 65536])
def test_effective_p(p):
    q = randfuse.effective_p(p)
    assert abs(q - p) <= 2**-17, f"p={p}: {q}"
    assert randfuse.effective_p(torch.tensor(p, dtype=torch.float64)) == q
    t = streams.threshold(p)
    assert streams.scale(t) * (1 - q) == pytest.approx(1.0 if t < 65536 else 0.0, abs=1e-15)


def test_rounding_is_half_to_even():
    assert streams.threshold(0.5 / 65536) == 0
    assert streams.threshold(1.5 / 65536) == 2


def test_tensor_p_is_clamped():
    values = [streams.threshold(torch.tensor(v)) for v in (-1.0, 2.0, float("nan"), float("inf"))]
    assert [int(v) for v in values] == [0, 65536, 0, 65536]


@pytest.mark.parametrize("call", [
    lambda: randfuse.key(1.5), lambda: randfuse.key(True), lambda: randfuse.fold_in(3, 4),
    lambda: randfuse.fold_in(randfuse.key(0), 1.5), lambda: randfuse.fold_in(randfuse.key(0), torch.ones(2)),
    lambda: randfuse.split(randfuse.key(0), 0), lambda: randfuse.effective_p(1.5), lambda: randfuse.effective_p("a"),
])  # fmt: skip
def test_bad_arguments(call):
    with pytest.raises((TypeError, ValueError), match=r"^\w+: \w+ must .*, got "):
        call()


# --- statistics of the decisions; fixed keys, so a failure is a change of code -------------------------------------
# Each comparison is a normal statistic; |z| < 6.2 is a false-positive rate of 6e-10 a comparison.


def z_of_agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Normal statistic of the correlation of two masks."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt() * a.numel() ** 0.5)


def test_neighbours_are_uncorrelated():
    """Masks of neighbouring rows, columns, blocks, tiles, keys, samples and offsets; n = 2^20 sees |rho| > 0.0093."""
    n, k = 1024, randfuse.key(11)
    base = randfuse.dropout_mask((n, n), 0.5, key=k)
    whole = randfuse.dropout_mask((n + 64, n + 64), 0.5, key=k)
    others = {f"rows {d}": whole[d : n + d, :n] for d in (1, 2, 16, 64)}
    others |= {f"columns {d}": whole[:n, d : n + d] for d in (1, 2, 7, 8, 16, 64)}
    others |= {f"key {s}": randfuse.dropout_mask((n, n), 0.5, key=randfuse.key(s)) for s in (0, 10, 12, 11 + 2**32)}
    others |= {f"sample {s}": randfuse.dropout_mask((n, n), 0.5, key=k, sample=s) for s in (1, 2)}
    others["fold_in"] = randfuse.dropout_mask((n, n), 0.5, key=randfuse.fold_in(k, 0))
    others["transposed"] = base.T
    z = {name: z_of_agreement(base, other) for name, other in others.items()}
    assert max(map(abs, z.values())) < 6.2, z


def test_shared_stream_is_detected():
    """Negative control of the above: a duplicated stream, even shifted by a block, shows."""
    a = randfuse.dropout_mask((1024, 1024), 0.5, key=randfuse.key(11))
    b = randfuse.dropout_mask((1024, 1024), 0.5, key=randfuse.key(11), col_offset=8)
    assert abs(z_of_agreement(a[:, 8:], b[:, :-8])) > 100


def test_input_and_output_streams_differ():
    key = randfuse.key(5)
    x = torch.ones(1024, 1024)
    output = randfuse.linear_dropout(x[:, :1], torch.ones(1024, 1), p=0.5, key=key) != 0
    assert abs(z_of_agreement(randfuse.dropout(x, 0.5, key=key) != 0, output)) < 6.2
