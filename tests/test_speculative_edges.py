"""`speculative_accept` where a coin falls within float32's rounding of an edge: float64 decides.

Logits are tuned until the edge lies at the coin that will be thrown, as near as a float32 logit can bring it (1e-7), on
either side by chance. Sums in float32 alone get some hundred of the thousand requests of a test wrong.
"""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
from randfuse import _extension, speculative_accept, use_backend
from randfuse.reference import streams

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
N, X = 1000, 3  # requests, the token that is drafted
KEYS = randfuse.split(randfuse.key(11), N)


@pytest.fixture(autouse=True)
def _kernels():
    with use_backend("auto"):
        yield


def coins(op: int, place: int = 0, word: int = 0) -> torch.Tensor:
    """(N,) of 53 bits, from words `word` and `word` + 1 of the block."""
    words = streams.block(KEYS, torch.zeros_like(KEYS), place, op=op, width=32, sample=0)
    return ((words[word + 1] << 21) | (words[word] >> 11)).double() * 2.0**-53


def log_odds(p: torch.Tensor) -> torch.Tensor:
    return p.log() - torch.log1p(-p)


def with_probability(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """float32 (N, V) logits in which X has probability p (N,), but for the rounding of its logit."""
    out = logits.expand(N, -1).clone()
    rest = out.double()
    rest[:, X] = -math.inf
    out[:, X] = log_odds(p) + rest.logsumexp(-1)
    return out


def law(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().softmax(-1)


@pytest.mark.parametrize("vocab", [5, 1500, 5000])
@pytest.mark.parametrize(("mode", "drafts"), [("token", "one-hot"), ("token", "law"), ("block", "law")])
def test_a_draft_next_to_the_edge(mode, drafts, vocab):
    u = coins(streams.ACCEPT_COIN)
    q_row = torch.randn(vocab)
    q = law(q_row)[X] if drafts == "law" else torch.ones((), dtype=torch.float64)
    target = with_probability(torch.randn(vocab), u * q)
    got = speculative_accept(
        torch.stack([target, target], 1), torch.full((N, 1), X), q_row.expand(N, 1, -1) if drafts == "law" else None,
        mode=mode, key=KEYS,
    )  # fmt: skip
    stands = u * q < law(target)[:, X]
    assert 0.2 < float(stands.double().mean()) < 0.8, "the test puts coins on either side"
    assert torch.equal(got.num_accepted == 1, stands)


def test_a_stop_of_block_next_to_the_edge():
    """Of two drafts the second falls; the first stands if u_1 < Z / (Z + 1 - w_1), which w_1 brings to u_1."""
    vocab, u = 1500, coins(streams.ACCEPT_COIN)
    q, second = torch.randn(2, vocab), torch.randn(vocab) * 2
    second[X] = -math.inf  # p = 0
    low, high = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)

    def h(w: torch.Tensor) -> torch.Tensor:
        z = (w.unsqueeze(-1) * law(second) - law(q[1])).clamp(min=0).sum(-1)
        return z / (z + (1 - w))

    for _ in range(60):
        middle = (low + high) / 2
        low, high = torch.where(h(middle) < u, middle, low), torch.where(h(middle) < u, high, middle)
    target = with_probability(torch.randn(vocab), low * law(q[0])[X])
    w = law(target)[:, X] / law(q[0])[X]
    rows = torch.stack([target, second.expand(N, -1), target], 1)
    got = speculative_accept(rows, torch.full((N, 2), X), q.expand(N, -1, -1), mode="block", key=KEYS)
    stands = u < h(w)
    assert 0.2 < float(stands.double().mean()) < 0.8, "the test puts coins on either side"
    assert torch.equal(got.num_accepted == 1, stands)


def two_tokens(u: torch.Tensor, vocab: int, tokens: tuple[int, int], base: float) -> torch.Tensor:
    """float32 (N, V) logits, `base` but at two tokens, of whose mass above a flat law the first has the fraction u."""
    out = torch.full((N, vocab), base, dtype=torch.float64)
    out[:, X] = -math.inf
    out[:, tokens[1]] = 6.0
    low, high = torch.full((N,), 0.0 if base == 0 else -40.0, dtype=torch.float64), torch.full((N,), 40.0).double()
    for _ in range(60):
        out[:, tokens[0]] = (low + high) / 2
        p = law(out)[:, tokens] - (1 / vocab if base == 0 else 0.0)
        less = p[:, 0] < u * p.sum(-1)
        low, high = torch.where(less, out[:, tokens[0]], low), torch.where(less, high, out[:, tokens[0]])
    out[:, tokens[0]] = low
    return out.float()


@pytest.mark.parametrize("place", ["residual", "after the last draft"])
@pytest.mark.parametrize(("tokens", "word"), [((500, 1800), 0), ((500, 700), 2)], ids=["tile", "token"])
def test_a_draw_next_to_the_edge(place, tokens, word):
    """Between two tokens in different tiles, or in one."""
    vocab, residual = 2048, place == "residual"
    u = coins(streams.RESIDUAL, word=word)
    target = two_tokens(u, vocab, tokens, base=0.0 if residual else -math.inf)
    ids, draft = torch.full((N, 1), X), torch.zeros(N, 1, vocab)
    if residual:  # p(X) = 0 and q flat: what is left are the two
        got = speculative_accept(torch.stack([target, target], 1), ids, draft, key=KEYS)
    else:
        got = speculative_accept(target.unsqueeze(1), ids[:, :0], key=KEYS)
    left = law(target)[:, tokens] - (1 / vocab if residual else 0.0)
    first = u * left.sum(-1) < left[:, 0]
    assert 0.2 < float(first.double().mean()) < 0.8, "the test puts coins on either side"
    assert torch.equal(got.tokens[:, 0], torch.where(first, *tokens))


@pytest.mark.parametrize("bound", ["threshold", "entropy"])
def test_typical_next_to_the_bound(bound):
    x = torch.randn(N, 1500)
    if bound == "threshold":
        target = with_probability(x, torch.full((N,), 0.09, dtype=torch.float64))
        got = speculative_accept(torch.stack([target, target], 1), torch.full((N, 1), X), mode="typical",
                                 typical_alpha=1e6, key=KEYS).num_accepted  # fmt: skip
        stands = law(target)[:, X] > 0.09
    else:  # alpha is one number a call
        p = law(x[:100])
        factor = (p * p.log()).sum(-1).exp()  # exp(-entropy)
        alphas = p[:, X] / factor * (1 + 1e-9 * torch.randn(100).double().sign())
        got = torch.cat([
            speculative_accept(row.expand(1, 2, -1), torch.tensor([[X]]), mode="typical", typical_threshold=1e6,
                               typical_alpha=float(alpha), key=KEYS[0]).num_accepted
            for row, alpha in zip(x, alphas, strict=False)
        ])  # fmt: skip
        stands = p[:, X] > alphas * factor
    assert 0.2 < float(stands.double().mean()) < 0.8, "the test puts laws on either side"
    assert torch.equal(got == 1, stands)
