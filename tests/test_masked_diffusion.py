"""Masked-diffusion steps: what may change, rules of selection, independence of the batch, arguments."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
import torch._dynamo.testing
from randfuse import _backends
from randfuse import masked_diffusion as md
from randfuse.masked_diffusion import _words
from randfuse.reference import streams

MASK = 9
B, L, V = 3, 12, 10


@pytest.fixture
def text():
    """Logits that favour [MASK], and tokens of which about a third is decoded."""
    logits = torch.randn(B, L, V) * 2
    logits[..., MASK] = 50.0
    tokens = torch.randint(0, V - 1, (B, L))
    return logits, tokens.where(torch.rand(B, L) < 0.3, MASK)


def steps_on(logits, tokens, key, **kwargs):
    """Every kind of step by name, as functions of nothing that give the new tokens."""
    common = {"mask_id": MASK, "key": key, "step": 5, **kwargs}
    clock = torch.zeros(len(tokens), dtype=torch.float64)
    return {
        "ancestral": lambda: md.ancestral_step(logits, tokens, 0.8, 0.4, **common),
        "first_hitting": lambda: md.first_hitting_step(logits, tokens, clock, **common).tokens,
        "hits": lambda: md.first_hitting_step(logits, tokens, clock, hits=3, **common).tokens,
        "cap": lambda: md.remask_step(logits, tokens, 0.6, 0.4, variant="cap", eta=0.3, **common).tokens,
        "conf": lambda: md.remask_step(logits, tokens, 0.6, 0.4, variant="conf", **common).tokens,
        "count": lambda: md.confidence_step(logits, tokens, count=3, temperature=0.7, **common),
        "threshold": lambda: md.confidence_step(logits, tokens, threshold=0.5, by="margin", **common),
        "factor": lambda: md.confidence_step(logits, tokens, factor=1.5, **common),
        "budget": lambda: md.confidence_step(logits, tokens, entropy_budget=1.5, by="entropy", **common),
        "noise": lambda: md.confidence_step(logits, tokens, count=3, noise=1.0, tempered=True, top_p=0.9, **common),
        "random": lambda: md.confidence_step(logits, tokens, count=3, by="random", **common),
    }


NAMES = list(steps_on(torch.zeros(1, 1, V), torch.zeros(1, 1, dtype=torch.int64), None))
REMASKING = ("cap", "conf")


@pytest.mark.parametrize("name", NAMES)
def test_decoded_tokens_stay_and_the_mask_token_is_never_drawn(text, name, device):
    logits, tokens = (x.to(device) for x in text)
    window = torch.ones_like(tokens, dtype=torch.bool)
    window[:, :4] = False
    before = tokens.clone()
    new = steps_on(logits, tokens, randfuse.key(1, device), window=window)[name]()
    assert torch.equal(tokens, before), "the input is not changed"
    changed = new != tokens
    assert changed.any(), "this key decodes something"
    assert not (changed & ~window).any(), "nothing changes outside of the window"
    if name not in REMASKING:
        assert not (changed & (tokens != MASK)).any(), "decoded tokens stay"
    assert ((new != MASK) | ~changed | (tokens != MASK)).all(), "[MASK] is never drawn"


@pytest.mark.parametrize("name", NAMES)
def test_same_tokens_in_any_batch_length_and_from_rows_alone(text, name, device):
    logits, tokens = (x.to(device) for x in text)
    keys = randfuse.split(randfuse.key(2, device), B)
    whole = steps_on(logits, tokens, randfuse.key(2, device))[name]()
    assert torch.equal(whole, steps_on(logits, tokens, keys)[name]()), "a key () stands for split(key, B)"
    flipped = steps_on(logits.flip(0), tokens.flip(0), keys.flip(0))[name]()
    assert torch.equal(whole, flipped.flip(0)), "order of the batch"
    assert torch.equal(whole[1:2], steps_on(logits[1:2], tokens[1:2], keys[1:2])[name]()), "alone"
    asked = []
    rows = lambda rows: asked.append(rows) or logits.flatten(0, 1)[rows]  # noqa: E731
    assert torch.equal(whole, steps_on(rows, tokens, keys)[name]()), "rows alone"
    assert len(asked) == 1, "the model is asked once"
    if name not in ("conf",):  # its softmax is over all that is decoded
        padded = torch.nn.functional.pad(tokens, (0, 3), value=1)
        wide = torch.nn.functional.pad(logits, (0, 0, 0, 3))
        window = torch.ones_like(padded, dtype=torch.bool)
        window[:, L:] = False
        assert torch.equal(whole, steps_on(wide, padded, keys, window=window)[name]()[:, :L]), "padded"


@pytest.mark.parametrize("name", NAMES)
def test_backends_agree(text, name, kernels_device):
    logits, tokens = text
    got = steps_on(logits.to(kernels_device), tokens.to(kernels_device), randfuse.key(3, kernels_device))[name]()
    with randfuse.use_backend("reference"):
        assert torch.equal(got.cpu(), steps_on(logits, tokens, randfuse.key(3))[name]())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_left_asks_no_model(name):
    tokens = torch.zeros(2, 5, dtype=torch.int64)

    def model(rows):
        raise AssertionError("must not be asked")

    out = steps_on(model, tokens, randfuse.key(0))[name]()
    assert ((out == tokens) | (out == MASK)).all()
    empty = torch.zeros(0, 5, dtype=torch.int64)
    assert steps_on(model, empty, randfuse.key(0))[name]().shape == (0, 5)


def test_only_changed_rows_are_asked_for():
    """1024 positions, one step of 128: 8 rows on average; more than 40 has probability below 1e-13."""
    tokens = torch.full((1, 1024), MASK)
    asked = []
    md.ancestral_step(lambda rows: asked.append(len(rows)) or torch.zeros(len(rows), V), tokens, 1.0, 1 - 1 / 128,
                      mask_id=MASK, key=randfuse.key(4))  # fmt: skip
    assert 0 < asked[0] < 40


SCHEDULES = [md.LogLinear(), md.LogLinear(1e-3), md.Cosine(), md.Polynomial(3.0), md.Geometric()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_schedules(schedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    level = schedule.level(t)
    assert (level.diff() > 0).all()
    assert torch.allclose(schedule.time(level), t, rtol=1e-9)
    (rate,) = torch.autograd.grad(level.sum(), t)
    assert torch.allclose(schedule.weight(t), rate / level, rtol=1e-9), "weight is m'/m"
    tokens = torch.full((1, 64), MASK)
    done = md.ancestral_step(torch.zeros(1, 64, V), tokens, 0.3, 0.0, mask_id=MASK, schedule=schedule)
    assert (done != MASK).all(), "s = 0 decodes everything"


@pytest.mark.parametrize("variant", ["cap", "rescale", "conf", "loop", "forward-backward", "dfm"])
def test_remasking_from_the_start_to_the_end_decodes_everything(variant):
    """One step over all times, where σ_max is 0/0: nothing stays masked, and nothing is masked again."""
    tokens = torch.full((1, 64), MASK)
    tokens[0, :9] = 1
    out = md.remask_step(torch.zeros(1, 64, V), tokens, 1.0, 0.0, mask_id=MASK, variant=variant)
    assert (out.tokens != MASK).all()
    assert (out.tokens[0, :9] == 1).all()


def test_per_sequence_times_and_steps():
    tokens = torch.full((2, 64), MASK)
    logits = torch.zeros(2, 64, V)
    keys = randfuse.split(randfuse.key(0), 2)
    both = md.ancestral_step(logits, tokens, torch.tensor([1.0, 0.5]), torch.tensor([0.7, 0.0]), mask_id=MASK,
                             step=torch.tensor([3, 8]), key=keys)  # fmt: skip
    for b, (t, s, n) in enumerate([(1.0, 0.7, 3), (0.5, 0.0, 8)]):
        alone = md.ancestral_step(logits[:1], tokens[:1], t, s, mask_id=MASK, step=n, key=keys[b : b + 1])
        assert torch.equal(both[b], alone[0])


def test_coins_resolve_small_probabilities_and_both_ends():
    word = torch.tensor([0, 1, 2**62, 2**63 - 1, -(2**63), -1])  # ascending as unsigned numbers
    for p, expected in [(0.0, 0), (2.0**-64, 1), (2.0**-63, 2), (0.25, 2), (0.5, 4), (1 - 2.0**-53, 5), (1.0, 6)]:
        assert int(_words.coin(word, torch.tensor(p, dtype=torch.float64)).sum()) == expected, p
    assert torch.equal(_words.index_below(word, torch.tensor(6)), torch.tensor([0, 0, 1, 2, 3, 5]))
    u = _words.uniform(word)
    assert float(u[0]) == 2.0**-65
    assert float(u[-1]) == 1 - 2.0**-53
    assert _words.gumbel(word).isfinite().all()


def test_words_are_those_of_the_specification():
    """Domain, step and position as docs/streams.md says: one block of Philox holds positions 2j and 2j + 1."""
    key, step = randfuse.key(11).reshape(1), torch.tensor(7)
    for domain in (12, 13, 14, 15):
        got = _words.words(key, domain, step, 5)
        r = streams.block(key, torch.zeros(1, dtype=torch.int64), 2, op=domain, width=64, sample=7)
        assert int(got[0, 4]) == int(r[0] | r[1] << 32)


def test_tokens_are_drawn_with_a_key_of_their_position(text):
    logits, tokens = text
    key = randfuse.key(5)
    out = md.reveal(logits, tokens, tokens == MASK, mask_id=MASK, step=6, key=key)
    b, position = (int(i) for i in (tokens == MASK).nonzero()[-1])
    own = randfuse.fold_in(randfuse.split(key, B)[b], (6 << 32) + position)
    expected = randfuse.categorical_sample(logits[b, position : position + 1], exclude=torch.tensor([MASK]), key=own)
    assert int(out[b, position]) == int(expected)


def test_a_mask_id_outside_of_the_vocabulary():
    out = md.ancestral_step(torch.randn(1, 40, 5), torch.full((1, 40), 5), 1.0, 0.0, mask_id=5)
    assert set(out.flatten().tolist()) == {0, 1, 2, 3, 4}


def test_guidance_is_that_of_the_sampler(text):
    logits, tokens = text
    guide = torch.randn_like(logits)
    options = {"mask_id": MASK, "key": randfuse.key(8), "temperature": 0.5}
    guided = guide + 3.0 * (logits - guide)
    a = md.confidence_step(logits, tokens, count=4, uncond_logits=guide, cfg_scale=2.0, **options)
    b = md.confidence_step(guided, tokens, count=4, **options)
    assert torch.equal(a, b)
    rows = md.confidence_step(lambda r: logits.flatten(0, 1)[r], tokens, count=4, cfg_scale=2.0,
                              uncond_logits=lambda r: guide.flatten(0, 1)[r], **options)  # fmt: skip
    assert torch.equal(a, rows)


# Selection.


def sure(*p: float) -> torch.Tensor:
    """(1, len(p), 3) logits whose likeliest token, 0, has the probabilities p; float64 for the extremes."""
    p = torch.tensor(p, dtype=torch.float64)
    return torch.stack([torch.zeros_like(p), (1 - p).log() - p.log(), torch.full_like(p, -math.inf)], -1).unsqueeze(0)


def chosen(logits, tokens=None, **kwargs):
    tokens = torch.full(logits.shape[:2], 2) if tokens is None else tokens
    return (
        md.confidence_step(logits, tokens, mask_id=2, temperature=0.0, **kwargs)[0].ne(2).nonzero().flatten().tolist()
    )


def test_selection_rules():
    logits = sure(0.6, 0.95, 0.8, 0.99, 0.7)
    assert chosen(logits, count=2) == [1, 3]
    assert chosen(logits, count=99) == [0, 1, 2, 3, 4]
    assert chosen(logits, count=0) == [3], "at least one"
    assert chosen(logits, count=torch.tensor([3])) == [1, 2, 3]
    assert chosen(logits, threshold=0.75) == [1, 2, 3]
    assert chosen(logits, threshold=0.999) == [3], "the surest where none reaches the threshold"
    assert chosen(logits, threshold=0.85, by="margin") == [1, 3]  # 2p - 1
    assert chosen(logits, threshold=0.3, by="entropy") == [1, 3]
    # Fast-dLLM's rule: the n-th may have p >= 1 - factor / (n + 1), here 0.5, 0.667, 0.75, 0.8
    assert chosen(logits, factor=1.0) == [1, 2, 3], "0.99, 0.95, 0.8 pass, 0.7 does not reach 0.8"
    assert chosen(logits, factor=0.5) == [1, 3], "1 - 0.5/4 = 0.875 is more than 0.8"
    assert chosen(logits, factor=1e-9) == [3], "the surest in any case"
    assert chosen(logits, factor=9.0) == [0, 1, 2, 3, 4], "no bound left"
    h = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.99, 0.95, 0.8, 0.7)]
    assert chosen(logits, entropy_budget=h[0] + h[1] + 1e-6, by="entropy") == [1, 2, 3]
    assert chosen(logits, entropy_budget=0.0, by="entropy") == [3]
    assert chosen(sure(0.7, 0.7, 0.7), count=2) == [0, 1], "equal scores go to the lowest position"


def test_deferred_tokens_are_decoded_last():
    logits = sure(0.6, 0.9, 0.8)
    logits[0, 1] = logits[0, 1].flip(-1)  # its likeliest token is 2, which is [MASK]: then 1
    logits[0, 1, 1] = 9.0
    assert chosen(logits, count=1) == [1]
    assert chosen(logits, count=2, defer=torch.tensor([1])) == [0, 2]


def test_uneven_rows_and_decoded_positions():
    """Dream's bug: a sequence with fewer masked positions than the count must not touch decoded ones."""
    logits = sure(0.6, 0.9, 0.8).expand(2, 3, 3)
    tokens = torch.tensor([[2, 2, 2], [1, 1, 2]])
    out = md.confidence_step(logits, tokens, mask_id=2, count=2, temperature=0.0)
    assert out.tolist() == [[2, 0, 0], [1, 1, 0]]


def test_ranks_do_not_saturate():
    """Probabilities from 1 - 1e-9 to 1 - 1e-12 are ranked right; as float32 they are all 1."""
    rest = torch.logspace(-9, -12, 20, dtype=torch.float64)[torch.randperm(20)]
    logits = torch.stack([torch.zeros(20), rest.log().float(), torch.full((20,), -math.inf)], -1).unsqueeze(0)
    order = rest.argsort()
    assert (1 - rest).float().unique().numel() == 1
    for by in ("probability", "margin"):
        for k in (1, 7, 19):
            assert chosen(logits, count=k, by=by) == sorted(order[:k].tolist())


def test_untempered_confidence_is_that_of_the_raw_logits():
    """At temperature 0.05 every token has p = 1; LLaDA ranks by softmax of the logits as they are."""
    logits = sure(0.7, 0.95, 0.8)
    tokens = torch.full((1, 3), 2)
    out = md.confidence_step(logits, tokens, mask_id=2, count=1, temperature=0.05, key=randfuse.key(0))
    assert out.tolist() == [[2, 0, 2]]
    x = torch.randn(1, 400, 6)
    full = torch.full((1, 400), 5)
    drawn = md.reveal(x, full, full == 5, mask_id=5, key=randfuse.key(1), temperature=1.5, top_k=3)
    raw = x.clone()
    raw[..., 5] = -math.inf
    p = raw.double().softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    out = md.confidence_step(x, full, mask_id=5, count=57, key=randfuse.key(1), temperature=1.5, top_k=3)
    assert set((out != 5).nonzero()[:, 1].tolist()) == set(p[0].topk(57).indices.tolist())
    assert torch.equal(out[out != 5], drawn[out != 5]), "what is kept is what was drawn"


def test_rows_without_a_law_are_decoded_last():
    logits = sure(0.6, 0.9, 0.8)
    logits[0, 1] = math.nan
    assert chosen(logits, count=2) == [0, 2]
    logits[0] = -math.inf
    assert chosen(logits, count=2) == [0, 1], "still at least as many as asked for"


def test_masked_rows_alone_and_all_rows_choose_the_same(text, monkeypatch):
    """What a GPU does to avoid a synchronisation: every row is drawn."""
    logits, tokens = text
    expected = md.confidence_step(logits, tokens, mask_id=MASK, count=2, key=randfuse.key(3))
    window = torch.ones_like(tokens, dtype=torch.bool)
    state = md._step.Step("x", tokens, MASK, 0, window, randfuse.key(3), None)
    monkeypatch.setattr(md.confidence, "_rows", lambda state: torch.arange(tokens.numel()))
    assert torch.equal(expected, md.confidence_step(logits, tokens, mask_id=MASK, count=2, key=state.keys))


def test_transfer_counts_sum_up():
    n = torch.tensor([0, 1, 7, 128])
    for steps in (1, 3, 128):
        counts = md.transfer_counts(n, steps)
        assert torch.equal(counts.sum(1), n)
        assert int(counts.max(1).values.sub(counts.min(1).values).max()) <= 1
    left = initial = torch.tensor([16, 5])
    for step in range(8):
        k = md.maskgit_count(left, initial, step, 8)
        left = left - k.clamp(min=1).minimum(left)
    assert left.tolist() == [0, 0]


def test_noise_samples_positions_without_replacement():
    """Dream's alg_temp: the first of count=1 is drawn from softmax(p / alg_temp); n = 4096, z below 5 (p = 6e-7)."""
    p, n, temp = torch.tensor([0.9, 0.8, 0.6], dtype=torch.float64), 4096, 0.2
    logits = sure(*p.tolist()).expand(n, 3, 3)
    out = md.confidence_step(logits, torch.full((n, 3), 2), mask_id=2, count=1, noise=temp, temperature=0.0)
    counts = out.ne(2).sum(0).double()
    law = (p / temp).softmax(0)
    assert ((counts - n * law).abs() / (n * law * (1 - law)).sqrt() < 5).all()


# Critic and value.


def test_select_by_score():
    tokens = torch.arange(6).reshape(1, 6)
    scores = torch.tensor([[0.5, 0.1, 0.9, 0.1, math.nan, 0.7]])
    masked = lambda n, **kw: (md.select_by_score(tokens, scores, n, mask_id=9, **kw) == 9).nonzero()[:, 1].tolist()  # noqa: E731
    assert masked(0) == []
    assert masked(1) == [4], "a NaN is the worst"
    assert masked(2) == [3, 4], "of equal scores the lower position stays"
    assert masked(6) == [0, 1, 2, 3, 4, 5]
    window = torch.tensor([[True, True, True, False, False, False]])
    assert masked(1, window=window) == [1]
    assert masked(5, window=window) == [0, 1, 2]


def test_candidates_are_independent_steps_from_one_read():
    n, m = 400, 3
    tokens = torch.full((n, 2), MASK)
    logits = torch.zeros(n, 2, V)
    asked = []
    model = lambda rows: asked.append(rows) or logits.flatten(0, 1)[rows]  # noqa: E731
    out = md.ancestral_candidates(model, tokens, 1.0, 0.5, m, mask_id=MASK, key=randfuse.key(0))
    assert len(asked) == 1
    assert out.shape == (m, n, 2)
    assert torch.equal(out[0], md.ancestral_step(logits, tokens, 1.0, 0.5, mask_id=MASK, key=randfuse.key(0)))
    for a, b in ((0, 1), (1, 2)):
        both = ((out[a] != MASK) & (out[b] != MASK)).double().mean()
        assert abs(both - 0.25) < 5 * math.sqrt(0.25 * 0.75 / (2 * n)), "coins of candidates are independent"
        same = (out[a] == out[b])[(out[a] != MASK) & (out[b] != MASK)].double()
        assert abs(same.mean() - 1 / 9) < 5 * math.sqrt(8 / 81 / len(same)), "so are their tokens"


def test_select_by_value_takes_the_best_or_samples():
    tokens = torch.full((2, 4), MASK)
    values = torch.tensor([[0.0, 5.0], [2.0, 1.0], [2.0, math.nan]])
    common = {"num_candidates": 3, "mask_id": MASK}
    out = md.select_by_value(torch.zeros(2, 4, V), tokens, 1.0, 0.0, lambda c: values, key=randfuse.key(0), **common)
    assert out.candidate.tolist() == [1, 0], "equal values go to the first, a NaN is the worst"
    n = 4096
    tokens, value = torch.full((n, 1), MASK), torch.tensor([0.0, 0.5, 1.0]).unsqueeze(1).expand(3, n)
    drawn = md.select_by_value(torch.zeros(n, 1, V), tokens, 1.0, 0.0, lambda c: value, alpha=0.7, **common).candidate
    law = (torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64) / 0.7).softmax(0)
    counts = drawn.bincount(minlength=3)
    assert ((counts - n * law).abs() / (n * law * (1 - law)).sqrt() < 5).all()


# Where they run.


@pytest.mark.parametrize("name", ["count", "threshold", "factor", "budget", "noise", "random"])
def test_confidence_waits_for_no_device(text, name):
    """Tensors without values stand for a GPU's: whatever asks for a value or a number of True ones fails on them."""
    logits, tokens = (x.to("meta") for x in text)
    key = torch.zeros(B, dtype=torch.int64, device="meta")
    out = steps_on(logits, tokens, key, window=torch.ones_like(tokens, dtype=torch.bool))[name]()
    assert out.shape == tokens.shape


def test_first_hit_waits_for_no_device(text):
    tokens, keys = text[1].to("meta"), torch.zeros(B, dtype=torch.int64, device="meta")
    hit = md.first_hit(tokens, torch.zeros(B, dtype=torch.float64, device="meta"), mask_id=MASK, key=keys, hits=2)
    assert hit.where.shape == tokens.shape


def test_negative_control_a_step_that_counts_waits(text):
    logits, tokens = (x.to("meta") for x in text)
    with pytest.raises((NotImplementedError, RuntimeError)):
        steps_on(logits, tokens, torch.zeros(B, dtype=torch.int64, device="meta"))["ancestral"]()


COMPILED = {
    "ancestral": lambda x, y, t, s, n, key: md.ancestral_step(x, y, t, s, mask_id=MASK, step=n, key=key),
    "first_hitting": lambda x, y, t, s, n, key: (
        md.first_hitting_step(x, y, -t.expand(B), mask_id=MASK, step=n, hits=2, key=key).tokens
    ),
    "cap": lambda x, y, t, s, n, key: md.remask_step(x, y, t, s, mask_id=MASK, eta=0.3, step=n, key=key).tokens,
    "conf": lambda x, y, t, s, n, key: md.remask_step(x, y, t, s, mask_id=MASK, variant="conf", step=n, key=key).tokens,
    "uniform": lambda x, y, t, s, n, key: md.uniform_step(x, y, t, s, vocab=V, step=n, key=key),
    "corrupt": lambda x, y, t, s, n, key: md.corrupt(y, t, mask_id=MASK, step=n, key=key),
    "count": lambda x, y, t, s, n, key: md.confidence_step(x, y, mask_id=MASK, count=2, step=n, key=key),
    "factor": lambda x, y, t, s, n, key: md.confidence_step(x, y, mask_id=MASK, factor=1.0, step=n, key=key),
}


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="needs the extension")
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(text, name):
    """The same tokens as in eager code, over four steps from the compilation for the first."""
    logits, tokens = text
    counter, first = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        step = torch.compile(COMPILED[name], backend=counter, fullgraph=True)
        for n, (t, s) in enumerate([(0.9, 0.6), (0.6, 0.4), (0.4, 0.2), (0.2, 0.0)]):
            at = (torch.tensor(t).double(), torch.tensor(s).double(), torch.tensor(n), randfuse.key(n))
            assert torch.equal(step(logits, tokens, *at), COMPILED[name](logits, tokens, *at)), f"step {n}"
            first = first or counter.frame_count
    assert counter.frame_count == first <= 2, "no later step compiles again"


# Training.


def test_corrupt_and_loss():
    tokens = torch.randint(0, V - 1, (8, 2000))
    t = md.sample_times(tokens)
    noisy = md.corrupt(tokens, t, mask_id=MASK)
    rate = (noisy == MASK).double().mean(1)
    assert ((rate - t).abs() < 5 * (t * (1 - t) / 2000).sqrt()).all()
    assert torch.equal(noisy[noisy != MASK], tokens[noisy != MASK])
    logits = torch.randn(8, 2000, V, requires_grad=True)
    x = logits.double().clone()
    x[..., MASK] = -math.inf
    nll = -x.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    expected = (nll / t.unsqueeze(-1)).where(noisy == MASK, 0.0)
    got = {r: md.loss(logits, tokens, noisy, t, mask_id=MASK, reduction=r) for r in ("mean", "sum", "none")}
    assert torch.allclose(got["none"].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(got["sum"].double(), expected.sum(), rtol=1e-5)
    assert torch.allclose(got["mean"].double(), expected.mean(), rtol=1e-5)
    (grad,) = torch.autograd.grad(got["mean"], logits)
    assert grad.isfinite().all()
    assert not grad[..., MASK].any()
    assert not grad[noisy != MASK].any()


# Arguments.


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"t": 1.5}, "t must be in"),
    ({"s": "x"}, "s must be a number"),
    ({"t": 0.2, "s": 0.3}, "s must be at most t"),
    ({"mask_id": -1}, "mask_id must be an id"),
    ({"step": 2**31}, "step must be in"),
    ({"step": 1.0}, "step must be an int"),
    ({"tokens": torch.zeros(2, 4)}, "tokens must be int64"),
    ({"window": torch.ones(4, 2, dtype=torch.bool)}, "window must be bool"),
    ({"key": torch.zeros(1, dtype=torch.int64)}, "key must have shape"),
    ({"logits": torch.zeros(4, 2, V)}, "logits must have shape"),
    ({"logits": 3.0}, "logits must be a Tensor or a function"),
    ({"schedule": 3}, "schedule must be a Schedule"),
    ({"uncond_logits": lambda rows: rows}, "uncond_logits must be a function exactly where"),
    ({"temperature": -1.0}, "temperature must be"),
])  # fmt: skip
def test_bad_arguments(kwargs, message):
    good = {"logits": torch.zeros(2, 4, V), "tokens": torch.full((2, 4), MASK), "t": 1.0, "s": 0.0, "mask_id": MASK}
    with pytest.raises((TypeError, ValueError), match=message):
        md.ancestral_step(**{**good, **kwargs})


@pytest.mark.parametrize(("call", "message"), [
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK), "exactly one of"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, count=1, threshold=0.5), "exactly one of"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, count=1, by="luck"), "by must be one of"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, threshold=2.0), "threshold must be in"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, threshold=-1.0, by="entropy"), "threshold must be in"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, entropy_budget=math.nan), "entropy_budget must be"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, count=1, noise=-1.0), "noise must be at least 0"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, count=1, noise=1.0, by="random"), "noise must be at least 0"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, count=1, noise=1.0, noise_on="p"), "noise_on must be"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, count=1, defer=[1]), "defer must be a Tensor"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, threshold=0.5, by="random"), "threshold must be used"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, factor=0.0), "factor must be positive"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, factor=1.0, by="margin"), "factor must be positive"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, factor=1.0, noise=1.0), "factor must be positive"),
    (lambda x, y: md.first_hitting_step(x, y, torch.zeros(2).double(), mask_id=MASK, hits=0), "hits must be a pos"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, count=1.5), "count must be an int"),
    (lambda x, y: md.confidence_step(x, y, mask_id=MASK, count=torch.tensor(1)), "count must be int64"),
    (lambda x, y: md.remask_step(x, y, 1.0, 0.5, mask_id=MASK, variant="no"), "variant must be one of"),
    (lambda x, y: md.remask_step(x, y, 1.0, 0.5, mask_id=MASK, eta=2.0), "eta must be in"),
    (lambda x, y: md.remask_step(x, y, 1.0, 0.5, mask_id=MASK, t_on=0.1, t_off=0.2), "t_off and t_on"),
    (lambda x, y: md.remask_step(x, y, 1.0, 0.5, mask_id=MASK, confidence=y), "confidence must be floating"),
    (lambda x, y: md.first_hitting_step(x, y, torch.zeros(2), mask_id=MASK), "clock must be float64"),
    (lambda x, y: md.first_hitting_step(x, y, 0.0, mask_id=MASK), "clock must be float64"),
    (lambda x, y: md.hitting_steps(y, torch.zeros(1), mask_id=MASK), "times must have shape"),
    (lambda x, y: md.hitting_steps(y, [1.0, 0.0], mask_id=MASK), "times must have shape"),
    (lambda x, y: md.hitting_steps(y, torch.tensor([0.0, 1.0]), mask_id=MASK), "times must descend"),
    (lambda x, y: md.uniform_step(x, y, 1.0, 0.5, vocab=5), "logits must have V = vocab"),
    (lambda x, y: md.sample_times(y, least=1.0), "least must be in"),
    (lambda x, y: md.transfer_counts(y[:, 0], 0), "steps must be positive"),
    (lambda x, y: md.select_by_score(y, y, 1, mask_id=MASK), "scores must be floating"),
    (lambda x, y: md.select_by_score(y, y.double(), 1.5, mask_id=MASK), "num_masked must be an int"),
    (lambda x, y: md.select_by_score(y, y.double(), y[:1, 0], mask_id=MASK), "num_masked must be int64"),
    (lambda x, y: md.select_by_score(y, y.double(), 1, noise=-1.0, mask_id=MASK), "noise must be at least 0"),
    (lambda x, y: md.select_by_value(x, y, 1.0, 0.5, lambda c: 3, num_candidates=2, mask_id=MASK), "value must give"),
    (lambda x, y: md.loss([1], y, y, 1.0, mask_id=MASK), "logits must be a floating"),
    (lambda x, y: md.ancestral_candidates(x, y, 1.0, 0.5, 0, mask_id=MASK), "num_candidates must be"),
    (lambda x, y: md.select_by_value(x, y, 1.0, 0.5, len, num_candidates=2, mask_id=MASK, alpha=-1), "alpha must be"),
    (lambda x, y: md.select_by_value(x, y, 1.0, 0.5, lambda c: x, num_candidates=2, mask_id=MASK), "value must give"),
    (lambda x, y: md.loss(x[:1], y, y, 1.0, mask_id=MASK), "logits must have shape"),
    (lambda x, y: md.loss(x, y, y, 1.0, mask_id=MASK, reduction="max"), "reduction must be"),
    (lambda x, y: md.reveal(x, y, y, mask_id=MASK), "where must be bool"),
])  # fmt: skip
def test_bad_arguments_of_other_steps(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.zeros(2, 4, V), torch.full((2, 4), MASK))
