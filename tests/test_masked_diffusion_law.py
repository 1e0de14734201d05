"""Laws of masked-diffusion steps against exact ones: a small Markov chain, whose posterior stands in for the network.

False-positive rate of every test 1e-6 with fixed keys. n = 2^14 texts in at most 64 cells see an error of 0.047 in
total variation with power 0.999.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import randfuse
import torch
from randfuse import masked_diffusion as md
from test_categorical_law import ALPHA, chi_square_p

K, LENGTH, MASK, N = 3, 4, 3, 2**14
STATES = (K + 1) ** LENGTH
PLACES = (K + 1) ** torch.arange(LENGTH)


@pytest.fixture(autouse=True)
def _kernels():
    with randfuse.use_backend("auto"):  # the reference gives the same tokens, test_masked_diffusion.py
        yield


def code(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens * PLACES).sum(-1)


def text(states: torch.Tensor) -> torch.Tensor:
    return states.unsqueeze(-1) // PLACES % (K + 1)


def chain() -> tuple[torch.Tensor, torch.Tensor]:
    """Law (STATES,) of whole texts, and the posterior (STATES, LENGTH, K) of each position given what is decoded."""
    start = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    move = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.45, 0.05]], dtype=torch.float64)
    x = text(torch.arange(STATES))
    whole = (x != MASK).all(-1)
    y = x.clamp(max=K - 1)
    law = (start[y[:, 0]] * move[y[:, :-1], y[:, 1:]].prod(-1)).where(whole, 0.0)
    fits = ((x.unsqueeze(1) == x) | (x.unsqueeze(1) == MASK)).all(-1)  # (state, text): the text agrees with the state
    mass = fits * law
    posterior = torch.stack([mass @ (x == v).double() for v in range(K)], -1)
    return law, posterior / mass.sum(-1).reshape(-1, 1, 1)


LAW, POSTERIOR = chain()
# [MASK] has a logit that would always win, were it not excluded.
LOGITS = torch.nn.functional.pad(POSTERIOR.log().float(), (0, 1), value=50.0)


def model(tokens: torch.Tensor) -> torch.Tensor:
    return LOGITS[code(tokens)]


def transition(unmask: float, remask: float) -> torch.Tensor:
    """Exact (STATES, STATES): positions change independently given the text."""
    x = text(torch.arange(STATES))
    new = x.unsqueeze(0)
    old = x.unsqueeze(1)
    stays = (1 - remask) * (new == old).double() + remask * (new == MASK).double()
    drawn = (
        POSTERIOR.unsqueeze(1)
        .expand(-1, STATES, -1, -1)
        .gather(-1, new.clamp(max=K - 1).expand(STATES, -1, -1).unsqueeze(-1))
    )
    opens = (unmask * drawn.squeeze(-1)).where(new != MASK, 1 - unmask)
    return torch.where(old == MASK, opens, stays).prod(-1)


def begin() -> torch.Tensor:
    return torch.full((N, LENGTH), MASK)


def all_masked() -> torch.Tensor:
    p = torch.zeros(STATES, dtype=torch.float64)
    p[code(torch.full((LENGTH,), MASK))] = 1
    return p


def p_value(tokens: torch.Tensor, law: torch.Tensor) -> float:
    return chi_square_p(torch.bincount(code(tokens), minlength=STATES), law)


@pytest.mark.parametrize("schedule", [md.LogLinear(), md.Cosine()], ids=["linear", "cosine"])
def test_ancestral_and_binned_first_hitting_have_the_law_of_t_steps(schedule):
    """In the middle and at the end: texts, and so which positions changed; and the steps themselves."""
    steps = 5
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    m = schedule.level(times)
    law, tokens, binned = all_masked(), begin(), begin()
    when = md.hitting_steps(binned, times, mask_id=MASK, schedule=schedule, key=randfuse.key(1))
    seen = torch.full((N, LENGTH), -1)
    for k in range(steps):
        before = tokens
        tokens = md.ancestral_step(model(tokens), tokens, float(times[k]), float(times[k + 1]), mask_id=MASK,
                                   schedule=schedule, step=k, key=randfuse.key(2))  # fmt: skip
        seen = torch.where((before == MASK) & (tokens != MASK), k, seen)
        binned = md.reveal(model(binned), binned, when == k, mask_id=MASK, step=k, key=randfuse.key(3))
        law = law @ transition(float((m[k] - m[k + 1]) / m[k]), 0.0)
        for name, got in (("ancestral", tokens), ("binned", binned)):
            assert p_value(got, law) > ALPHA, f"{name}, step {k}"
    cell = (m[:-1] - m[1:]) / m[0]
    joint = cell
    for _ in range(LENGTH - 1):
        joint = (joint.unsqueeze(-1) * cell).flatten()
    for name, steps_of in (("ancestral", seen), ("binned", when)):
        at = (steps_of * steps ** torch.arange(LENGTH)).sum(-1)
        assert chi_square_p(torch.bincount(at, minlength=len(joint)), joint) > ALPHA, f"{name}: joint law of steps"


def test_first_hitting_gives_the_law_of_the_chain():
    tokens, clock = begin(), torch.zeros(N, dtype=torch.float64)
    for event in range(LENGTH):
        before, earlier = tokens, clock
        tokens, clock = md.first_hitting_step(
            model(tokens), tokens, clock, mask_id=MASK, step=event, key=randfuse.key(4)
        )
        where = (tokens != MASK) & (before == MASK)
        assert (where.sum(1) == 1).all()
        n = LENGTH - event
        u = ((clock - earlier) * n).exp()  # (τ/τ′)^n is uniform: the times are order statistics
        bins = (u * 64).long()
        assert chi_square_p(torch.bincount(bins, minlength=64), torch.full((64,), 1 / 64).double()) > ALPHA
        # of the positions left each is hit equally often, whatever the time
        rank = ((before == MASK).cumsum(1) * where).sum(1) - 1
        at = rank * 8 + (u * 8).long()
        assert chi_square_p(torch.bincount(at, minlength=8 * n), torch.full((8 * n,), 1 / (8 * n)).double()) > ALPHA
    assert p_value(tokens, LAW) > ALPHA
    _, last = md.first_hitting_step(model(tokens), tokens, clock, mask_id=MASK, step=LENGTH, key=randfuse.key(4))
    assert torch.equal(last, clock), "nothing left: the clock rests"


def test_several_hits_at_once_are_the_events_of_single_ones():
    """Positions and clocks are those of the same events one after the other, on texts masked wholly or in part."""
    start, keys = begin()[:64], randfuse.split(randfuse.key(10), 64)
    start[:32, 1:] = 0  # one position left: the others' events are none
    tokens = start
    clock = torch.zeros(64, dtype=torch.float64)
    at_once = md.first_hit(start, clock, hits=3, mask_id=MASK, step=2, key=keys)
    for event in (2, 3, 4):
        hit = md.first_hit(tokens, clock, mask_id=MASK, step=event, key=keys)
        tokens, clock = tokens.masked_fill(hit.where, 0), hit.clock
    assert torch.equal(at_once.clock, clock)
    assert torch.equal(at_once.where, start != tokens)
    assert at_once.where.sum(1).tolist() == [1] * 32 + [3] * 32


def test_negative_control_few_ancestral_steps_do_not_have_the_law_of_the_chain():
    """Positions decoded together are independent: the test of first hitting sees that 2 steps are not enough."""
    tokens = begin()
    for k, (t, s) in enumerate([(1.0, 0.5), (0.5, 0.0)]):
        tokens = md.ancestral_step(model(tokens), tokens, t, s, mask_id=MASK, step=k, key=randfuse.key(5))
    assert p_value(tokens, LAW) < ALPHA


def levels(variant: str, t: float, s: float) -> tuple[float, float]:
    if variant != "loop":
        return t, s
    alpha = lambda u: 0.9 * (1 - u) / 0.45 if u > 0.55 else 1 - u * 0.1 / 0.05 if u <= 0.05 else 0.9  # noqa: E731
    return 1 - alpha(t), 1 - alpha(s)


def rates(variant: str, t: float, s: float, eta: float) -> tuple[float, float]:
    """ReMDM's formulas in terms of α, as published."""
    m_t, m_s = levels(variant, t, s)
    a_t, a_s = 1 - m_t, 1 - m_s
    if variant == "dfm" and t < 1 and s > 0:
        b = 10 * t**0.25 * (1 - t) ** 0.25
        return (b + 1) * (a_s - a_t) / (1 - a_t), b * (a_s / a_t - 1)
    most = min(1.0, (1 - a_s) / a_t) if a_t else 1.0
    sigma = {
        "cap": min(eta, most), "rescale": eta * most, "loop": min(eta, most) if 0.05 < t <= 0.55 else 0.0,
        "forward-backward": min((a_s - a_t) / a_t, most) if a_t else 1.0, "dfm": 0.0,
    }[variant]  # fmt: skip
    return (a_s - (1 - sigma) * a_t) / (1 - a_t), sigma


VARIANTS = ["cap", "rescale", "loop", "forward-backward", "dfm"]
TIMES = [1.0, 0.7, 0.5, 0.3, 0.04, 0.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_remasking(variant):
    """Joint law of texts after every step, and P(masked) = 1 − α_s of every position."""
    times = TIMES
    if variant == "dfm":
        times = [1.0, 0.8]
        while times[-1] > 0.45:
            times.append(times[-1] - min(md.dfm_step_size(times[-1], 8), times[-1]))
        times.append(0.0)
    law, tokens, n_masked = all_masked(), begin(), N * LENGTH
    for k, (t, s) in enumerate(pairwise(times)):
        unmask, remask = rates(variant, t, s, 0.3)
        assert -1e-12 < unmask < 1 + 1e-12
        assert -1e-12 < remask < 1 + 1e-12
        law = law @ transition(unmask, remask)
        masked = float(((text(torch.arange(STATES)) == MASK).double().mean(-1) * law).sum())
        assert math.isclose(masked, levels(variant, t, s)[1], abs_tol=1e-12), "the schedule's marginal"
        tokens = md.remask_step(model(tokens), tokens, t, s, mask_id=MASK, variant=variant, eta=0.3, step=k,
                                key=randfuse.key(6)).tokens  # fmt: skip
        assert p_value(tokens, law) > ALPHA, f"step {k}"
        n_masked = int((tokens == MASK).sum())
    assert n_masked == 0


def test_negative_control_coins_drawn_once_for_all_steps():
    """Remask coins that are not fresh at every step, as with noise drawn before the loop, give another law."""
    law, tokens = all_masked(), begin()
    for t, s in pairwise([1.0, 0.9, 0.8, 0.7, 0.6, 0.5]):
        law = law @ transition(*rates("cap", t, s, 0.6))
        tokens = md.remask_step(model(tokens), tokens, t, s, mask_id=MASK, eta=0.6, step=0, key=randfuse.key(7)).tokens
    assert p_value(tokens, law) < ALPHA


def test_remask_without_strength_is_ancestral():
    tokens = torch.randint(0, 2, (100, LENGTH)) * MASK
    for variant in ("cap", "rescale"):
        out = md.remask_step(
            model(tokens), tokens, 0.7, 0.4, mask_id=MASK, variant=variant, eta=0.0, key=randfuse.key(0)
        )
        assert torch.equal(
            out.tokens, md.ancestral_step(model(tokens), tokens, 0.7, 0.4, mask_id=MASK, key=randfuse.key(0))
        )


def test_remask_by_confidence():
    """σ = σ_max·softmax(−p) over decoded positions; the probability of a fresh token is recorded."""
    row = torch.tensor([0, MASK, 1, 2])
    held = torch.tensor([0.9, 0.0, 0.2, 0.5])
    tokens, conf = row.expand(N, LENGTH).clone(), held.expand(N, LENGTH)
    t, s = 0.6, 0.35
    out = md.remask_step(
        model(tokens), tokens, t, s, mask_id=MASK, variant="conf", confidence=conf, key=randfuse.key(8)
    )
    decoded = torch.tensor([True, False, True, True])
    share = (-held[decoded].double()).softmax(0) * min(1.0, s / (1 - t))
    p = torch.zeros(LENGTH, dtype=torch.float64)
    p[decoded], p[1] = share, (t - s) / t
    changed = (out.tokens != tokens).double().mean(0)
    assert ((changed - p).abs() < 5 * (p * (1 - p) / N).sqrt()).all(), f"{changed} is not {p}"
    fresh = (tokens == MASK) & (out.tokens != MASK)
    drawn = model(tokens)[..., :K].softmax(-1).gather(-1, out.tokens.clamp(max=K - 1).unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(out.confidence[fresh], drawn[fresh], atol=1e-6)
    assert not out.confidence[out.tokens == MASK].any()
    same = out.tokens == tokens
    assert torch.equal(out.confidence[same], conf[same])
    fully = md.remask_step(model(begin()), begin(), 1.0, 0.9, mask_id=MASK, variant="conf")
    assert fully.tokens.min() >= 0, "no decoded token: no NaN"


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.6), (0.5, 0.3), (0.3, 0.0)])
def test_uniform_state_step(t, s):
    """Against the published posterior, built with one-hot vectors."""
    row = torch.tensor([0, 2, 1, 1])
    x_theta = torch.tensor([[0.5, 0.3, 0.2], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4], [0.0, 1.0, 0.0]], dtype=torch.float64)
    here = torch.eye(K, dtype=torch.float64)[row]
    a_t, a_s = 1 - t, 1 - s
    a = a_t / a_s
    known = (x_theta * here).sum(-1, keepdim=True)
    q = a_t * K * known * here + (a - a_t) * here + (a_s - a_t) * x_theta + (1 - a) * (1 - a_s) / K
    q = q / (a_t * K * known + 1 - a_t)
    assert torch.allclose(q.sum(-1), torch.ones(LENGTH, dtype=torch.float64))
    tokens = row.expand(N, LENGTH)
    asked = []
    logits = x_theta.log().float().expand(N, LENGTH, K)
    out = md.uniform_step(
        lambda r: asked.append(len(r)) or logits.flatten(0, 1)[r], tokens, t, s, vocab=K, key=randfuse.key(9)
    )
    for i in range(LENGTH):
        assert chi_square_p(torch.bincount(out[:, i], minlength=K), q[i]) > ALPHA, f"position {i}"
    pairs = out[:, 0] * K + out[:, 2]
    assert chi_square_p(torch.bincount(pairs, minlength=K * K), (q[0].unsqueeze(1) * q[2]).flatten()) > ALPHA
    bound = min(1.0, (a_s - a_t + (1 - a) * (1 - a_s)) / (1 - a_t))
    spread = 5 * math.sqrt(bound * (1 - bound) * N * LENGTH)
    assert abs(asked[0] - bound * N * LENGTH) <= spread, "rows read are thinned with the bound"
    cold = md.uniform_step(
        LOGITS[:1, :1, :K].expand(N, LENGTH, K), tokens, t, s, vocab=K, temperature=0.0, key=randfuse.key(9)
    )
    peak = md.uniform_step(1e4 * LOGITS[:1, :1, :K].expand(N, LENGTH, K), tokens, t, s, vocab=K, key=randfuse.key(9))
    assert torch.equal(cold, peak), "temperature 0 is the limit"
