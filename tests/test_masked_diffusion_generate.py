"""The loop: models that count their calls, prompts, blocks, and agreement with the steps it is made of."""

from __future__ import annotations

from itertools import pairwise

import pytest
import randfuse
import torch
from randfuse import masked_diffusion as md
from randfuse.masked_diffusion.generate import OPTIONS as METHODS
from test_categorical_law import ALPHA
from test_masked_diffusion_law import LAW, LENGTH, model, p_value

MASK, V = 9, 10


class Counting(torch.nn.Module):
    """Logits that depend on the position; remembers how often and for what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, []

    def forward(self, tokens):
        self.calls += 1
        self.seen.append(tokens.clone())
        return torch.randn(tokens.shape[1], V, generator=torch.Generator().manual_seed(0)).expand(*tokens.shape, V)


class Rows(Counting):
    def forward(self, tokens, rows, t):
        self.asked = [*getattr(self, "asked", []), (rows, t)]
        return super().forward(tokens).flatten(0, 1)[rows]


def prompts(lengths=(2, 5, 0), total=16) -> torch.Tensor:
    tokens = torch.full((len(lengths), total), MASK)
    for b, n in enumerate(lengths):
        tokens[b, :n] = torch.arange(n) % (V - 1)
    return tokens


OPTIONS = {"uniform": {"vocab": V - 1}, "maskgit": {"noise": 2.0}, "remdm-cap": {"eta": 0.2}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_length", [None, 5])
def test_everything_is_decoded_and_prompts_stay(method, block_length):
    tokens = prompts()
    common = {"mask_id": MASK, "method": method, "steps": 12, "block_length": block_length, "key": randfuse.key(0)}
    common["options"] = OPTIONS.get(method)
    m = Counting()
    if method == "uniform":
        m.forward_ = m.forward
        m.forward = lambda tokens: m.forward_(tokens)[..., : V - 1]
    out = md.generate(m, tokens, **common)
    assert (out != MASK).all()
    assert torch.equal(out[tokens != MASK], tokens[tokens != MASK])
    assert (tokens == prompts()).all(), "the input is not changed"
    if method != "uniform":
        keys = randfuse.split(randfuse.key(0), 3)
        rows = Rows()
        assert torch.equal(out, md.generate(rows, tokens, **common)), "rows alone give the same text"
        assert rows.calls == m.calls
        assert sum(len(r) for r, _ in rows.asked) <= sum(int((x == MASK).sum()) for x in rows.seen)
        alone = [md.generate(Counting(), tokens[b : b + 1], **{**common, "key": keys[b : b + 1]}) for b in range(3)]
        if method in ("ancestral", "first_hitting", "remdm-cap") and block_length is None:
            assert torch.equal(out, torch.cat(alone)), "a text does not depend on its batch"


def test_ancestral_calls_the_model_only_when_something_changes():
    tokens, m = prompts((2,)), Counting()
    out = md.generate(m, tokens, mask_id=MASK, steps=100_000, key=randfuse.key(1))
    assert m.calls <= 14, "14 masked positions change at most 14 times"
    assert (out != MASK).all()
    assert all(not torch.equal(a, b) for a, b in pairwise(m.seen))
    none = Counting()
    assert torch.equal(md.generate(none, out, mask_id=MASK), out)
    assert none.calls == 0
    m = Counting()
    md.generate(m, tokens, mask_id=MASK, method="remdm-cap", steps=300, options={"eta": 0.0})
    assert m.calls <= 14


def test_first_hitting_asks_for_one_row_of_each_text_and_the_time():
    tokens, rows = prompts((2, 5)), Rows()
    md.generate(rows, tokens, mask_id=MASK, method="first_hitting", key=randfuse.key(1))
    assert rows.calls == 14
    assert [len(r) for r, _ in rows.asked] == [2] * 11 + [1] * 3
    times = torch.stack([t for _, t in rows.asked])
    assert (times[1:, 0] < times[:-1, 0]).all()
    assert (times > 0).all()
    assert (times < 1).all()


def test_several_hits_a_call():
    tokens, m = prompts((2, 5)), Counting()
    out = md.generate(m, tokens, mask_id=MASK, method="first_hitting", options={"hits": 4}, key=randfuse.key(1))
    assert m.calls == 4, "14 masked positions, 4 at a time"
    assert (out != MASK).all()


def test_number_of_calls_of_ranked_methods():
    tokens = prompts((4, 8))
    for steps, expected in ((3, 3), (12, 12), (50, 12)):
        m = Counting()
        md.generate(m, tokens, mask_id=MASK, method="confidence", steps=steps, temperature=0.0)
        assert m.calls == expected
    m = Counting()
    md.generate(m, tokens, mask_id=MASK, method="confidence", options={"threshold": 0.0})
    assert m.calls == 1, "all reach the threshold"
    m = Counting()
    md.generate(m, tokens, mask_id=MASK, method="confidence", options={"threshold": 1.0})
    assert m.calls == 12, "none does: one at a time"
    m = Counting()
    md.generate(m, tokens, mask_id=MASK, method="entropy", options={"entropy_budget": 1e9})
    assert m.calls == 1


def test_blocks_go_from_left_to_right_in_every_text():
    tokens, order = prompts((2, 5, 0)), torch.full((3, 16), -1)
    state = tokens.clone()

    def watch(step, new):
        order[(new != state) & (state == MASK)] = step
        state.copy_(new)

    md.generate(Counting(), tokens, mask_id=MASK, method="random", steps=16, block_length=4, callback=watch)
    for b, n in enumerate((2, 5, 0)):
        steps = order[b, n:]
        blocks = [steps[i : i + 4] for i in range(0, len(steps), 4)]
        assert all(int(x.max()) < int(y.min()) for x, y in pairwise(blocks))


def test_callback_may_replace_tokens():
    def first(step, tokens):
        return tokens.masked_fill(tokens == 3, 4)

    out = md.generate(Counting(), prompts(), mask_id=MASK, steps=8, callback=first)
    assert not (out[:, 5:] == 3).any()


@pytest.mark.parametrize("method", ["first_hitting", "random"])
def test_law_of_whole_texts(method):
    """One position at a time with the exact posterior gives the law of the chain; n = 2^12 sees an error of 0.09."""
    out = md.generate(model, torch.full((2**12, LENGTH), 3), mask_id=3, method=method, key=randfuse.key(2))
    assert p_value(out, LAW) > ALPHA


@pytest.mark.parametrize("method", METHODS)
def test_a_single_step_decodes_everything(method):
    out = md.generate(
        Counting(),
        prompts(),
        mask_id=MASK,
        method=method,
        steps=1,
        options={"vocab": V} if method == "uniform" else None,
    )
    assert method == "uniform" or (out != MASK).all()


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    md.generate(Counting(), prompts(), mask_id=MASK, steps=4, progress=True)
    assert "41/41" in capsys.readouterr().err


def test_bad_arguments():
    bad = [
        ({"method": "magic"}, "method must be one of"),
        ({"steps": 0}, "steps must be"),
        ({"block_length": 1.5}, "block_length must be"),
        ({"window": 3}, "window must be"),
        ({"model": 3}, "model must be callable"),
        ({"model": lambda tokens: torch.zeros(4)}, "model must give logits"),
        ({"model": lambda tokens: object()}, "model must give logits"),
        ({"tokens": [1]}, "tokens must be a Tensor"),
        ({"mask_id": -1}, "mask_id must be an id"),
        ({"schedule": 3}, "schedule must be a Schedule"),
        ({"options": {"eta": 0.1}}, "options of 'ancestral' must be among"),
        ({"method": "maskgit", "options": {"threshold": 0.9}}, "options of 'maskgit' must be among"),
        ({"method": "first_hitting", "options": {"hits": 0}}, "hits must be"),
        ({"method": "uniform"}, "options must have vocab"),
        ({"method": "uniform", "options": {"vocab": 5}}, "logits must have V = vocab"),
        ({"method": "uniform", "options": {"vocab": V}, "top_p": 0.9}, "sampling of 'uniform' must be among"),
        ({"num_samples": 2}, "sampling of 'ancestral' must be among"),
        ({"callback": lambda step, tokens: tokens[:1]}, "callback: tokens must have shape"),
    ]
    for kwargs, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            md.generate(**{"model": Counting(), "tokens": prompts(), "mask_id": MASK, **kwargs})
