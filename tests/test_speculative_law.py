"""The law of `speculative_accept` against float64 enumeration, and rules that must fail the same tests.

Every test has false-positive rate 1e-6 (fixed keys: it is right or wrong once and for all). With n samples a chi-square
sees a total-variation error of sqrt(λ / 4n) with power 0.999; λ = 96, 104, 142 for 16, 27, 64 cells: 0.02 at n = 2^16.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import NamedTuple

import pytest
import randfuse
import torch
from randfuse import categorical_sample, categorical_sample_with_stats, fold_in, speculative_accept, use_backend
from randfuse.reference import streams

ALPHA = 1e-6
LOSSLESS = ["token", "block", "match"]


@pytest.fixture(autouse=True)
def _kernels():
    with use_backend("auto"):  # the reference gives the same tokens, test_speculative_accept.py
        yield


def p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Pearson's test of counts against a law over the same cells; cells that expect less than 5 are merged."""
    expected = law.double() * counts.sum()
    assert not counts[expected == 0].any(), "something of no probability was seen"
    small = expected < 5
    seen = torch.cat([counts[~small].double(), counts[small].double().sum().reshape(1)])
    expected = torch.cat([expected[~small], expected[small].sum().reshape(1)])
    seen, expected = seen[expected > 0], expected[expected > 0]
    chi2 = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2.0, dtype=torch.float64), chi2 / 2))


class Models:
    """Two laws of the next token given all tokens before it, as tables over prefixes."""

    def __init__(self, vocab: int, length: int, seed: int, spread: float = 1.2) -> None:
        g = torch.Generator().manual_seed(seed)
        self.vocab = vocab
        shapes = [(vocab,) * (t + 1) for t in range(length)]
        self.p_logits = [(torch.randn(s, generator=g, dtype=torch.float64) * spread).float() for s in shapes]
        self.q_logits = [(torch.randn(s, generator=g, dtype=torch.float64) * spread).float() for s in shapes]

    def p(self, prefix: tuple[int, ...]) -> torch.Tensor:
        return self.p_logits[len(prefix)][prefix].double().softmax(-1)

    def q(self, prefix: tuple[int, ...]) -> torch.Tensor:
        return self.q_logits[len(prefix)][prefix].double().softmax(-1)

    def rows(self, tables: list[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """(n, V) logits of the token after each row of text (n, t)."""
        return tables[text.shape[1]][tuple(text.unbind(-1))] if text.shape[1] else tables[0].expand(len(text), -1)

    def text_law(self, length: int) -> torch.Tensor:
        """(V,)*length probabilities of texts under the target."""
        law = torch.ones((), dtype=torch.float64)
        for t in range(length):
            law = law.unsqueeze(-1) * self.p_logits[t].double().softmax(-1)
        return law


def enumerated(models: Models, k: int, mode: str, one_hot: bool) -> dict[tuple[int, ...], float]:
    """P(what one step emits): all drafts, and each rule's law of the stop with independent uniforms, in closed form."""
    law: dict[tuple[int, ...], float] = defaultdict(float)
    vocab = models.vocab
    for x in itertools.product(range(vocab), repeat=k):
        p = [models.p(x[:j]) for j in range(k + 1)]
        q = [models.q(x[:j]) for j in range(k)]
        drafted = math.prod(float(q[j][x[j]]) for j in range(k))
        if one_hot or mode == "match":
            q = [torch.nn.functional.one_hot(torch.tensor(x[j]), vocab).double() for j in range(k)]
        w = [1.0]
        for j in range(k):
            ratio = float(p[j][x[j]] / q[j][x[j]])
            w.append(min(1.0, ratio * w[-1]) if mode == "block" else min(1.0, ratio))
        stops, left = [0.0] * (k + 1), 1.0
        if mode == "block":
            for i in range(k, 0, -1):
                z = float((w[i] * p[i] - q[i]).clamp(min=0).sum()) if i < k else 0.0
                h = w[k] if i == k else z / (z + 1 - w[i]) if z + 1 - w[i] > 0 else 1.0
                stops[i], left = left * h, left * (1 - h)
            stops[0] = left
        else:
            for i in range(k):
                stops[i], left = left * (1 - w[i + 1]), left * w[i + 1]
            stops[k] = left
        for i, stop in enumerate(stops):
            rest = ((w[i] if mode == "block" else 1.0) * p[i] - q[i]).clamp(min=0) if i < k else p[k]
            if stop > 0:
                for y, mass in enumerate((rest / rest.sum()).tolist()):
                    law[(*x[:i], y)] += drafted * stop * mass
    return law


def completed(models: Models, law: dict[tuple[int, ...], float], length: int) -> torch.Tensor:
    """The law of texts when the target itself goes on after what the step emitted."""
    out = torch.zeros((models.vocab,) * length, dtype=torch.float64)
    for emitted, mass in law.items():
        rest = torch.ones((), dtype=torch.float64)
        for t in range(len(emitted), length):
            rest = rest.unsqueeze(-1) * models.p_logits[t][emitted].double().softmax(-1)
        out[emitted] += mass * rest
    return out


def draft_keys(keys: torch.Tensor, position: int, j: int, of: str) -> torch.Tensor:
    """Of the j-th draft of a step: its own in each step, or that of its place in the text (coupled drafts)."""
    return fold_in(fold_in(keys, position), j) if of == "step" else fold_in(keys, position + j)


def one_step(models: Models, keys: torch.Tensor, text: torch.Tensor, k: int, mode: str, *, one_hot: bool = False,
             draft_error: float = 1.0, drafts: str = "step"):  # fmt: skip
    """Drafts by our own sampler under the same keys, then the op; text (n, t) is what came before."""
    n, position = text.shape
    target, draft, drafted = [models.rows(models.p_logits, text)], [], text
    for j in range(k):
        draft.append(models.rows(models.q_logits, drafted))
        coupled = mode == "match"
        token = categorical_sample(draft[-1], method="race" if coupled else "cdf",
                                   key=draft_keys(keys, position, j, "place" if coupled else drafts))  # fmt: skip
        drafted = torch.cat([drafted, token.unsqueeze(-1)], -1)
        target.append(models.rows(models.p_logits, drafted))
    positions = torch.full((n,), position)
    logits = None if one_hot or mode == "match" else torch.stack(draft, 1) * draft_error
    return speculative_accept(torch.stack(target, 1), drafted[:, position:], logits, mode=mode, key=keys,
                              positions=positions)  # fmt: skip


SIZES = [(2, 3), (3, 2), (4, 2), (5, 1), (5, 2)]


@pytest.mark.parametrize("mode", LOSSLESS)
@pytest.mark.parametrize(("vocab", "k"), SIZES)
def test_enumeration(vocab, k, mode):
    """The rule's law, completed by the target, is the target's to 1e-12; the op's emissions have the rule's law."""
    for one_hot in (False, True):
        models = Models(vocab, k + 1, seed=vocab * 10 + k)
        law = enumerated(models, k, "token" if one_hot and mode == "block" else mode, one_hot)
        torch.testing.assert_close(completed(models, law, k + 1), models.text_law(k + 1), rtol=0, atol=1e-12)
        if mode == "match":
            continue  # coupled drafts agree more often than the closed form says: test_three_steps
        keys = randfuse.split(randfuse.key(k), 2**15)
        got = one_step(models, keys, torch.empty(2**15, 0, dtype=torch.int64), k, mode, one_hot=one_hot)
        digits = (vocab + 1) ** torch.arange(k + 1)  # a number for every text of up to k + 1 tokens
        found = torch.bincount(((got.tokens + 1) * digits).sum(-1), minlength=(vocab + 1) ** (k + 1))
        cells = [sum((v + 1) * int(d) for v, d in zip(emitted, digits, strict=False)) for emitted in law]
        counts = found[cells]
        assert counts.sum() == found.sum(), "something that the rule cannot emit"
        assert p_value(counts, torch.tensor(list(law.values()))) > ALPHA, f"one-hot: {one_hot}"


def decoded(models: Models, keys: torch.Tensor, length: int, k: int, mode: str, step=one_step, **kwargs):
    """(n, length) texts, each decoded in as many steps as it needs under one key."""
    n = len(keys)
    text, done = torch.full((n, length + k + 1), -1), torch.zeros(n, dtype=torch.int64)
    for _ in range(length):
        for t in range(length):
            at = (done == t).nonzero().squeeze(-1)
            if len(at) == 0:
                continue
            got = step(models, keys[at], text[at, :t], min(k, length - 1), mode, **kwargs)
            text[at, t : t + got.tokens.shape[1]] = got.tokens
            done[at] = t + got.num_accepted + 1
    assert (done >= length).all()
    return text[:, :length]


def texts(models: Models, n: int, length: int, k: int, mode: str, step=one_step, seed: int = 1, **kwargs):
    """Counts of n decoded texts."""
    text = decoded(models, randfuse.split(randfuse.key(seed), n), length, k, mode, step, **kwargs)
    index = torch.zeros(n, dtype=torch.int64)
    for t in range(length):
        index = index * models.vocab + text[:, t]
    return torch.bincount(index, minlength=models.vocab**length)


def test_match_writes_one_text_whatever_is_drafted():
    """Without drafts, with few or many, good or bad ones, alone or in a batch of any order. Mode token does not."""
    models, worse = Models(5, 8, seed=9), Models(5, 8, seed=9)
    worse.q_logits = [q.flip(-1) for q in worse.q_logits]
    keys = randfuse.split(randfuse.key(7), 200)
    plain = decoded(models, keys, 4, 0, "match")
    order = torch.randperm(200)
    for k in (1, 2, 3):
        assert torch.equal(decoded(models, keys, 4, k, "match"), plain), f"{k} drafts"
        assert torch.equal(decoded(worse, keys, 4, k, "match"), plain), f"{k} bad drafts"
        assert torch.equal(decoded(models, keys[order], 4, k, "match"), plain[order]), "another order"
        assert torch.equal(decoded(models, keys[5:6], 4, k, "match"), plain[5:6]), "alone"
    assert not torch.equal(decoded(models, keys, 4, 2, "token"), decoded(worse, keys, 4, 2, "token"))


@pytest.mark.parametrize("mode", LOSSLESS)
def test_joint_law_over_three_steps(mode):
    """Four tokens take up to four steps, in which one key serves draft, coins and residual: the law is the target's."""
    models = Models(3, 7, seed=5)
    counts = texts(models, 2**16, 4, 2, mode)
    assert p_value(counts, models.text_law(4).reshape(-1)) > ALPHA


# The rules once more, on all requests at once and with injected coins, so that controls differ in one thing.


def coins_of(words) -> torch.Tensor:
    low, high, *_ = words
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


class Emitted(NamedTuple):
    tokens: torch.Tensor
    num_accepted: torch.Tensor


def injected(models, keys, text, k, mode, *, coins="step", residual="block"):
    """Block or token verification as plain tensors. coins: "step", those of the op; "place", of the place in the text;
    "draft", those that the draft was drawn with."""
    n, position = text.shape
    row, drafted = torch.zeros(n, dtype=torch.int64), text
    p, q, u = [models.rows(models.p_logits, text).double().softmax(-1)], [], []
    for j in range(k):
        logits = models.rows(models.q_logits, drafted)
        q.append(logits.double().softmax(-1))
        own = draft_keys(keys, position, j, "step")
        drafted = torch.cat([drafted, categorical_sample(logits, key=own).unsqueeze(-1)], -1)
        p.append(models.rows(models.p_logits, drafted).double().softmax(-1))
        of = {
            "step": (fold_in(keys, position), j, streams.ACCEPT_COIN),
            "place": (fold_in(keys, position + j), 0, streams.ACCEPT_COIN),
            "draft": (own, 0, streams.CATEGORICAL),
        }[coins]
        words = streams.block(of[0], row, of[1], op=of[2], width=32, sample=0)
        u.append(coins_of(words[2:] if coins == "draft" else words))
    w = [torch.ones(n, dtype=torch.float64)]
    stop, w_stop, standing = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.float64), torch.ones(n).bool()
    for i in range(1, k + 1):
        x = drafted[:, position + i - 1 : position + i]
        ratio = (p[i - 1].gather(-1, x) / q[i - 1].gather(-1, x)).squeeze(-1)
        w.append((w[-1] * ratio if mode == "block" else ratio).clamp(max=1.0))
        z = (w[i].unsqueeze(-1) * p[i] - q[i]).clamp(min=0).sum(-1) if i < k else torch.zeros(())
        h = w[i] if mode == "token" or i == k else z / (z + 1 - w[i])
        stands = u[i - 1] < h
        standing = standing & stands if mode == "token" else stands
        stop, w_stop = torch.where(standing, i, stop), torch.where(standing, w[i], w_stop)
    stacked, q_last = torch.stack(p, 1), torch.stack([*q, torch.zeros_like(q[0])], 1)
    pick = stop.reshape(-1, 1, 1).expand(-1, 1, models.vocab)
    factor = w_stop if mode == "block" and residual == "block" else torch.ones(())
    factor = torch.where(stop == k, 1.0, factor)
    rest = (factor.unsqueeze(-1) * stacked.gather(1, pick).squeeze(1) - q_last.gather(1, pick).squeeze(1)).clamp(min=0)
    last = categorical_sample(rest.log(), key=fold_in(fold_in(keys, position), 12345))
    place = torch.arange(k + 1)
    tokens = torch.cat([drafted[:, position:], last.unsqueeze(-1)], -1).where(place <= stop.unsqueeze(-1), -1)
    return Emitted(tokens.scatter(1, stop.unsqueeze(-1), last.unsqueeze(-1)), stop)


@pytest.mark.parametrize("mode", ["token", "block"])
def test_injected_coins_of_the_step_decide_as_the_op_does(mode):
    models = Models(3, 4, seed=5)
    keys, text = randfuse.split(randfuse.key(2), 4096), torch.empty(4096, 0, dtype=torch.int64)
    op, plain = one_step(models, keys, text, 3, mode), injected(models, keys, text, 3, mode)
    assert torch.equal(op.num_accepted, plain.num_accepted)


def test_negative_control_coins_of_places_fail_in_mode_block():
    models = Models(3, 8, seed=5, spread=0.7)
    law = models.text_law(4).reshape(-1)
    assert p_value(texts(models, 2**15, 4, 3, "block", step=injected), law) > ALPHA
    assert p_value(texts(models, 2**15, 4, 3, "block", step=injected, coins="place"), law) < ALPHA


def test_negative_control_drafts_of_places_fail_in_mode_block():
    """It has seen drafts beyond the stop, so the next step must not draw its own from the same words."""
    models = Models(3, 7, seed=5)
    law = models.text_law(4).reshape(-1)
    assert p_value(texts(models, 2**15, 4, 2, "block", drafts="place"), law) < ALPHA
    assert p_value(texts(models, 2**15, 4, 2, "token", drafts="place"), law) > ALPHA


def test_negative_control_a_shared_stream_fails():
    models = Models(3, 4, seed=8)
    assert p_value(texts(models, 2**15, 2, 2, "token", step=injected), models.text_law(2).reshape(-1)) > ALPHA
    counts = texts(models, 2**15, 2, 2, "token", step=injected, coins="draft")
    assert p_value(counts, models.text_law(2).reshape(-1)) < ALPHA


def test_negative_control_the_residual_of_token_fails_in_mode_block():
    models = Models(3, 8, seed=3, spread=2.0)
    counts = texts(models, 2**15, 4, 2, "block", step=injected, residual="token")
    assert p_value(counts, models.text_law(4).reshape(-1)) < ALPHA


@pytest.mark.parametrize("mode", ["token", "block"])
def test_negative_control_a_draft_law_off_by_a_tenth_fails(mode):
    models = Models(3, 6, seed=6)
    law = models.text_law(3).reshape(-1)
    assert p_value(texts(models, 2**15, 3, 2, mode), law) > ALPHA
    assert p_value(texts(models, 2**15, 3, 2, mode, draft_error=0.9), law) < ALPHA


def cells_of(p: torch.Tensor, cells: int = 64) -> torch.Tensor:
    """Tokens merged by likelihood into cells of about equal mass, before the data."""
    order = p.argsort(descending=True)
    cell = torch.empty_like(order)
    cell[order] = (p[order].cumsum(0) - p[order] / 2).mul(cells).long().clamp(max=cells - 1)
    return cell


# n sees a total-variation error of 0.033 at V = 4096, of 0.066 (match: 0.093) at 151936.
@pytest.mark.parametrize("mode", LOSSLESS)
@pytest.mark.parametrize("vocab", [4096, 151936])
def test_chi_square_at_every_place(vocab, mode):
    """Drafts by our own sampler under the same keys; the target itself goes on after the stop, so all requests reach
    all places, and have the target's law there whatever the rule looked at to stop."""
    k, n = 3, 2**15 if vocab < 2**16 else 2**12 if mode == "match" else 2**13
    p_row = (torch.randn(vocab) * 2).bfloat16()
    q_row = (p_row.float() + torch.randn(vocab) * 0.5).bfloat16()
    keys, place = randfuse.split(randfuse.key(3), n), torch.arange(k)
    method = "race" if mode == "match" else "cdf"
    own = fold_in(keys.unsqueeze(-1), place) if mode == "match" else fold_in(fold_in(keys, 0).unsqueeze(-1), place)
    drafted = categorical_sample_with_stats(q_row.expand(n, k, vocab), 1.2, method=method, key=own.reshape(-1))
    lse = categorical_sample_with_stats(p_row, 1.2).logsumexp.expand(n, k + 1)
    got = speculative_accept(
        p_row.expand(n, k + 1, vocab), drafted.tokens, None if mode == "match" else q_row.expand(n, k, vocab),
        temperature=1.2, mode=mode, key=keys, positions=torch.zeros(n, dtype=torch.int64), target_logsumexp=lse,
        draft_logsumexp=drafted.logsumexp,
    )  # fmt: skip
    assert float(got.num_accepted.double().mean()) > 0.5
    later = categorical_sample(p_row, 1.2, num_samples=n * (k + 1), key=randfuse.key(4)).view(n, k + 1)
    tokens = got.tokens.where(got.tokens >= 0, later)
    p = (p_row.double() / 1.2).softmax(-1)
    cell = cells_of(p)
    law = torch.zeros(64, dtype=torch.float64).index_add(0, cell, p)
    for j in range(k + 1):
        assert p_value(torch.bincount(cell[tokens[:, j]], minlength=64), law) > ALPHA, f"place {j}"


def binomial_range(n: int, p: float) -> tuple[float, float]:
    spread = 5.0 * math.sqrt(n * p * (1 - p)) + 14
    return n * p - spread, n * p + spread


@pytest.mark.parametrize("vocab", [2, 50, 3000])
def test_acceptance_rates(vocab):
    """Σ min(p, q) with the draft's law, p(x) without."""
    n = 2**15
    p_row, q_row = torch.randn(vocab), torch.randn(vocab)
    p, q = p_row.double().softmax(-1), q_row.double().softmax(-1)
    drafts = categorical_sample(q_row.expand(n, 1, vocab), key=randfuse.key(1))
    target = p_row.expand(n, 2, vocab)
    with_law = speculative_accept(target, drafts, q_row.expand(n, 1, vocab), key=randfuse.key(2)).num_accepted
    low, high = binomial_range(n, float(torch.minimum(p, q).sum()))
    assert low < int(with_law.sum()) < high
    one_hot = speculative_accept(target, drafts, key=randfuse.key(2)).num_accepted
    low, high = binomial_range(n, float((p * q).sum()))
    assert low < int(one_hot.sum()) < high


def test_block_accepts_more():
    """The paper's example: p = (1/3, 2/3), q = (2/3, 1/3), two drafts: 10/9 of them stand by token, 11/9 by block."""
    n = 2**16
    target = torch.tensor([1.0, 2.0]).log().expand(n, 3, 2)
    draft = torch.tensor([2.0, 1.0]).log().expand(n, 2, 2)
    drafts = categorical_sample(draft, key=randfuse.key(1))
    for mode, mean in (("token", 10 / 9), ("block", 11 / 9)):
        accepted = speculative_accept(target, drafts, draft, mode=mode, key=randfuse.key(2)).num_accepted.double()
        assert abs(float(accepted.mean()) - mean) < 5.5 * float(accepted.std()) / n**0.5, mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_laws_always_stand_and_the_impossible_never_comes(dtype):
    n, k, vocab = 4096, 3, 1500
    target = (torch.randn(1, k + 1, vocab) * 3).to(dtype).expand(n, -1, -1)
    drafts = categorical_sample(target[:, :k], 0.7, key=randfuse.key(1))
    for mode in ("token", "block"):
        got = speculative_accept(target, drafts, target[:, :k], temperature=0.7, mode=mode, key=randfuse.key(2))
        assert (got.num_accepted == k).all(), mode
    allowed = torch.rand(vocab) < 0.5
    masked = target[0].masked_fill(~allowed, -math.inf).expand(n, -1, -1)
    for mode in (*LOSSLESS, "typical"):
        for draft in (target[:, :k], None):
            got = speculative_accept(masked, drafts, draft, temperature=0.7, mode=mode, key=randfuse.key(2))
            assert allowed[got.tokens[got.tokens >= 0]].all(), mode
            assert not (got.num_accepted == k).all()


def test_coins_at_both_ends(monkeypatch):
    """u = 0 accepts nothing of p = 0, u = 1 - 2^-53 rejects nothing where p = q: the reference with forced words."""
    target = torch.tensor([[[-math.inf, 0.0, 0.0], [0.0, -math.inf, 0.0]]])
    for word, expected in ((0, 0), (0xFFFFFFFF, 0)):
        forced = lambda key, rows, *_, word=word, **__: tuple(torch.full_like(rows, word) for _ in range(4))  # noqa: E731
        monkeypatch.setattr(streams, "block", forced)
        with use_backend("reference"):
            for draft in (torch.tensor([[[0.0, -1.0, -1.0]]]), None):
                for mode in ("token", "block"):
                    got = speculative_accept(target, torch.tensor([[0]]), draft, mode=mode, key=randfuse.key(0))
                    assert got.num_accepted.tolist() == [expected], "a token of no probability stands"
                    assert got.tokens[0, 0] in (1, 2)
            same = speculative_accept(target, torch.tensor([[1]]), target[:, :1], key=randfuse.key(0))
            assert same.num_accepted.tolist() == [1], "equal laws"


def poisson_range(mean: float) -> tuple[float, float]:
    """Counts outside have probability below 1e-6 on either side (Chernoff)."""
    spread = math.sqrt(2 * mean * math.log(1 / ALPHA))
    return mean - spread, mean + spread + math.log(1 / ALPHA)


TAIL = 262144
FAR_TAILS = [("token", 20.5, 100_032), ("match", 18.0, 16384)]  # 33 and 65 hits expected


@pytest.mark.parametrize(("mode", "gap", "draws"), FAR_TAILS)
def test_far_tail(mode, gap, draws):
    """One head and 262144 tail tokens, each 1e-9 (gap 20.5) or 1.5e-8 (18) as likely; the head is what was drafted.

    In mode token a request has eight places to leave the head at: seven coins and the draw after them."""
    k = 7 if mode == "token" else 0
    x = torch.full((TAIL + 1,), -gap)
    x[0] = 0.0
    p = 1 - 1 / (1 + TAIL * math.exp(-gap))
    n = draws // (k + 1)
    saved = torch.full((n, k + 1), -math.log1p(-p), dtype=torch.float64)
    got = speculative_accept(x.expand(n, k + 1, TAIL + 1), torch.zeros(n, k, dtype=torch.int64), mode=mode,
                             key=randfuse.key(4), target_logsumexp=saved)  # fmt: skip
    last = got.tokens.gather(1, got.num_accepted.unsqueeze(-1)).squeeze(-1)
    mean = n * (1 - (1 - p) ** (k + 1))
    low, high = poisson_range(mean)
    hits = last[last != 0]
    assert low < len(hits) < high, f"{len(hits)} hits, expected {mean:.1f}"
    assert hits.unique().numel() > 0.8 * len(hits), "the hits spread over the tail"


@pytest.mark.parametrize(("mode", "gap", "draws"), FAR_TAILS)
def test_negative_control_gumbel_noise_of_24_bits_starves_the_tail(mode, gap, draws):
    """argmax(x + g), g = −log(−log u) of u = k 2⁻²⁴, as float32 has it: g of the tail ends at 16.6. What it then hits,
    0 or 5 times, is known, and is outside of what the test above allows. The same noise of 53 bits is inside.

    Of the tail only the largest u counts: its law is that of v^(1/TAIL), rounded down to the bits, v uniform."""

    def noise(u: torch.Tensor) -> torch.Tensor:
        return -(-u.log()).log()

    v, head = torch.rand(2, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    largest = v ** (1 / TAIL)
    steps = torch.arange(2**24 - 4000, 2**24, dtype=torch.float64) / 2**24  # below lies e^-62 of the law of the largest
    mass = (steps + 2.0**-24) ** TAIL - steps**TAIL
    starved = draws * float((mass * (-(gap - noise(steps)).exp()).exp()).sum())
    low, high = poisson_range(draws * (1 - 1 / (1 + TAIL * math.exp(-gap))))
    assert low < int((noise(largest) - gap > noise(head)).sum()) < high, "53 bits"
    hits = int((noise((largest * 2**24).floor() / 2**24) - gap > noise(head)).sum())
    assert hits < low, f"{hits} hits of 24 bits must be too few, {low:.1f} at least"
    assert hits < poisson_range(starved)[1], f"{hits} hits of 24 bits, expected {starved:.1f}"
