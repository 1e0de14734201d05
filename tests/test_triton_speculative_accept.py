"""Speculative acceptance on the Triton backend against the CPU op; where and how it runs: test_triton.py.

Tokens are equal to the bit here. In modes token, block and typical a coin within float32 rounding of an edge may fall
otherwise (some 1 in 10^5 requests at these sizes); a failure on another device that is one token wide may be that.
"""

import math

import pytest
import randfuse
import torch
from randfuse import speculative_accept, speculative_accept_tree
from test_speculative_accept import peculiar, step
from test_triton import (
    on_device,
    op,
    pytestmark,  # noqa: F401  the interpreter's warnings
    same_bits,
)

NAN, INF = math.nan, math.inf
ALL = ["token", "block", "match", "typical"]


def moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def assert_same(device, target, ids, draft=None, *, name="result", **kwargs):
    """Decisions of the CPU op on copies of the arguments, log-probabilities within float32 rounding of its own."""
    with randfuse.use_backend("auto"):
        expected = speculative_accept(target, ids, draft, **kwargs)
    with randfuse.use_backend("triton"):
        got = speculative_accept(*(moved(x, device) for x in (target, ids, draft)),
                                 **{n: moved(x, device) for n, x in kwargs.items()})  # fmt: skip
    for field in ("tokens", "num_accepted", "status"):
        same_bits(getattr(got, field).cpu(), getattr(expected, field), f"{name}: {field}")
    torch.testing.assert_close(got.logprobs.cpu(), expected.logprobs, rtol=1e-5, atol=3e-6, equal_nan=True)
    return expected


@on_device
@pytest.mark.parametrize(
    ("mode", "dtype", "vocab"),
    [
        ("token", torch.bfloat16, 2050),
        ("block", torch.float16, 1100),
        ("block", torch.float32, 1),
        ("match", torch.float32, 1025),
        ("typical", torch.bfloat16, 1100),
    ],
)
def test_modes(device, mode, dtype, vocab):
    target, ids, draft = step(3, 2, vocab, dtype)
    args = {"mode": mode, "temperature": 0.8, "key": randfuse.key(1), "positions": torch.arange(3) * 7}
    assert_same(device, target, ids, draft, name="logits", **args)
    assert_same(device, target, ids, name="one-hot", **args)


@on_device
@pytest.mark.parametrize(
    ("mode", "kwargs"), [("token", {"top_k": 2}), ("token", {"draft_temperature": 0.0}), ("block", {})], ids=str
)
def test_many_small_requests(device, mode, kwargs):
    """Stops at every place, tokens that are cut or banned although they are likely, w below 1."""
    target, ids, draft = step(12, 2, 6, noise=2.0)
    expected = assert_same(device, target, ids, draft, mode=mode, key=randfuse.key(12), **kwargs)
    assert set(expected.num_accepted.tolist()) == {0, 1, 2}, "stops at every place"


@on_device
def test_entropy_of_tiles_apart(device):
    """A third of the mass lies six below the largest logit, in another tile: 1.8 nats of the entropy."""
    target = torch.zeros(2, 2, 1030)
    target[..., 1024:] = 6.0
    ids = torch.tensor([[1027], [5]])
    expected = assert_same(device, target, ids, mode="typical", typical_threshold=1.0, typical_alpha=1.5,
                           key=randfuse.key(13))  # fmt: skip
    assert expected.num_accepted.tolist() == [1, 0], "p = 0.117 and 0.0003 beside 1.5 exp(-3.9)"


@on_device
def test_a_ban_takes_the_mass_of_its_tile(device):
    """A draft without logits that has half of the mass, alone in its tile but for five: those are not drawn for it."""
    target = torch.zeros(8, 2, 1030)
    target[..., 1027] = 7.0
    expected = assert_same(device, target, torch.full((8, 1), 1027), key=randfuse.key(14))
    assert 0 < expected.num_accepted.sum() < 8, "some stand, some fall"


@on_device
@pytest.mark.parametrize("mode", ALL)
def test_parameters_of_requests(device, mode):
    """Greedy and random requests side by side, each with its own filters, mask, key and draft temperature."""
    b, k, vocab = 4, 2, 1030
    target, ids, draft = step(b, k, vocab, noise=0.1)
    bits = torch.randint(-(2**31), 2**31 - 1, (b, k + 1, 33), dtype=torch.int32)
    bits[::2] = -1
    assert_same(
        device, target, ids, draft, mode=mode, temperature=torch.tensor([0.0, 0.7, 1.3, 1.0]),
        draft_temperature=torch.tensor([1.0, 0.0, 1.3, 0.9]), top_k=torch.tensor([1, 50, 1030, 99]),
        top_p=torch.linspace(0.5, 1.0, b), min_p=torch.tensor(0.01), bitmask=bits,
        positions=torch.randint(0, 2**62, (b,)), key=randfuse.split(randfuse.key(3), b),
    )  # fmt: skip


@on_device
@pytest.mark.parametrize("mode", ALL)
def test_rows_of_every_kind(device, mode):
    target, ids, draft = peculiar(1, 40)
    ids[3, 0], ids[8, 0], ids[14, 0] = 40, -2, -1
    if mode in ("match", "typical"):
        target, ids, draft = target[::2], ids[::2], draft[::2]  # those of the target
    assert_same(device, target, ids, draft, mode=mode, key=randfuse.key(7))
    if mode == "typical":
        assert_same(device, target, ids, mode="token", key=randfuse.key(7), name="one-hot")
        assert_same(device, target, ids, mode=mode, temperature=0.0, key=randfuse.key(7), name="greedy")


@on_device
@pytest.mark.parametrize("mode", ["token", "block"])
def test_saved_logsumexps(device, mode):
    """They stand for a read of the row; a value that is no number does not, and a wrong one shows."""
    b, k, vocab = 4, 2, 1030
    target, ids, draft = step(b, k, vocab)
    target[0, 0, :3], draft[1, 0, :2] = NAN, NAN  # not seen where the sum is given
    lse = {"target_logsumexp": (target.nan_to_num(-INF).double() / 0.9).logsumexp(-1),
           "draft_logsumexp": (draft.nan_to_num(-INF) / 0.9).logsumexp(-1)}  # fmt: skip
    args = {"mode": mode, "temperature": 0.9, "key": randfuse.key(4)}
    assert_same(device, target, ids, draft, name="both", **args, **lse)
    lse["draft_logsumexp"][:, 0] = torch.tensor([NAN, INF, 0.0, 30.0])
    lse["target_logsumexp"][1:, 1] = torch.tensor([NAN, INF, -INF])
    assert_same(device, target, ids, draft, name="some", **args, **lse)
    if mode == "token":
        del lse["draft_logsumexp"]
        assert_same(device, target, ids, name="one-hot", **args, **lse)


@on_device
@pytest.mark.parametrize("mode", ["token", "block"])
def test_draft_vocabulary_maps(device, mode):
    """Fewer tokens, in any order; several logits of one token, one of them NaN or −inf."""
    b, k, vocab, width = 6, 2, 1030, 20
    target, ids, _ = step(b, k, vocab)
    draft, mapping = torch.randn(b, k, width) * 2, torch.randint(0, vocab, (width,))
    mapping[:12], mapping[12:] = ids.reshape(-1), ids[:, :1].reshape(-1).repeat(2)[:8]
    draft[:, :, 12:] += 1
    target[:, :k].scatter_add_(-1, ids.unsqueeze(-1), torch.full((b, k, 1), 7.0))  # p is of the size of q
    draft[0, 0, 0], draft[1, 0, 8], draft[2, 0, :3] = NAN, -INF, INF
    assert_same(device, target, ids, draft, mode=mode, draft_to_target=mapping, key=randfuse.key(5))


@on_device
def test_logits_of_one_token_add_up(device):
    """Eight of twenty make q = 0.4 of a draft with p = 0.2: it stands half of the time, not always as with 1 / 13."""
    vocab, token = 1030, 1027
    target, draft, mapping = torch.zeros(12, 2, vocab), torch.zeros(12, 1, 20), torch.arange(20)
    target[:, :, token], mapping[:8] = math.log(0.25 * (vocab - 1)), token
    expected = assert_same(device, target, torch.full((12, 1), token), draft, draft_to_target=mapping,
                           key=randfuse.key(15))  # fmt: skip
    assert 0 < expected.num_accepted.sum() < 12, "some stand, some fall"


@on_device
@pytest.mark.parametrize("mode", ["token", "block"])
def test_ragged_batches(device, mode):
    """num_drafts, −1 placeholders and packed rows are one thing, wherever the rows lie; one request has no rows."""
    b, k, vocab = 4, 2, 50
    target, ids, draft = step(b, k, vocab, noise=0.1)
    counts, args = torch.tensor([0, 1, 2, 1]), {"mode": mode, "key": randfuse.split(randfuse.key(6), b)}
    by_count = assert_same(device, target, ids, draft, num_drafts=counts, name="counts", **args)
    placeholders = ids.where(torch.arange(k) < counts.unsqueeze(-1), -1)
    buffer = torch.full((b, k + 3, vocab + 7), NAN)
    buffer[:, : k + 1, :vocab] = target
    turned = draft.transpose(0, 1).contiguous().transpose(0, 1)
    by_id = assert_same(device, buffer[:, : k + 1, :vocab], placeholders, turned, name="strides", **args)
    same_bits(by_id.tokens, by_count.tokens, "placeholders")
    rows = target[torch.arange(k + 1) <= counts.unsqueeze(-1)]
    packed = assert_same(device, rows, ids, draft, cu_num_logits=torch.tensor([0, 1, 3, 6, 8]), name="packed", **args)
    same_bits(packed.tokens, by_count.tokens, "packed")
    if mode == "token":
        cu = torch.tensor([0, 1, 1, 4, 6])
        assert_same(device, rows, ids, draft, cu_num_logits=cu, top_p=0.9, name="no rows", **args)


@on_device
def test_values_out_of_range(device):
    """What cannot be refused on a GPU has a result: checked where the launcher itself is called."""
    target, ids, draft = (x.to(device) for x in step(3, 2, 30))
    one, key, rest = torch.ones((), device=device), randfuse.key(2, device), ("token", 0.1, 0.3, *[None] * 4)
    run = op("speculative_accept")
    plain = run(target, ids, key, draft, None, None, one, *[None] * 5, *rest)
    counts = torch.tensor([9, 2, 2**40], device=device)
    for got, expected in zip(run(target, ids, key, draft, counts, None, one, *[None] * 5, *rest), plain, strict=True):
        same_bits(got, expected, "more drafts than there are")
    cu = torch.tensor([-4, 3, 2, 2**40], device=device)  # rows 0 … 2, none, 2 … 4
    tokens, accepted, _, _ = run(target[0].repeat(2, 1)[:4], ids, key, draft, None, cu, one, *[None] * 5, *rest)
    same_bits(tokens[0], plain[0][0], "rows from 0 on")
    assert tokens[1].tolist() == [-1, -1, -1]
    assert (tokens[2] >= 0).sum() == accepted[2] + 1 <= 2, "no more rows than there are"
    wild = torch.tensor([5, -1, 40, 2**40] + [7] * 26, device=device)
    tokens, *_ = run(target, ids, key, draft, None, None, one, *[None] * 5, *rest[:-2], wild, None)
    assert ((tokens[:, 0] >= 0) & (tokens < 30).all(-1)).all(), "ids that the map sends nowhere have q = 0"


@on_device
@pytest.mark.parametrize("mode", ["token", "block"])
def test_the_share_of_a_program_changes_nothing(device, mode, monkeypatch):
    from randfuse.triton_kernels import speculative_accept as kernels

    target, ids, draft = step(2, 2, 3100, noise=1.5)
    lse = target.double().logsumexp(-1)
    for programs in (4, 8):  # spans of 2 and 1 in mode token, 4 and 2 in mode block
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        assert_same(device, target, ids, draft, mode=mode, key=randfuse.key(8), target_logsumexp=lse)


@on_device
def test_trees_and_empty_batches(device):
    """A tree is a categorical_sample with statistics and a walk."""
    parents = torch.tensor([[0, 0, 1, 1, 2]]).expand(3, -1)
    target, ids = torch.randn(3, 6, 40) * 3, torch.randint(0, 5, (3, 5))
    target[:, :, :5] += 6
    tree = {"temperature": torch.tensor([0.0, 0.7, 1.0]), "key": randfuse.key(9), "positions": torch.arange(3)}
    with randfuse.use_backend("auto"):
        expected = speculative_accept_tree(target, ids, parents, **tree)
    with randfuse.use_backend("triton"):
        moved_tree = {n: moved(x, device) for n, x in tree.items()}
        got = speculative_accept_tree(target.to(device), ids.to(device), parents.to(device), **moved_tree)
        for shape in ((0, 3), (0, 0), (2, 0)):
            t, i, d = (x.to(device) for x in step(*shape, 30))
            empty = speculative_accept(t, i, d, mode="block", key=randfuse.key(1, device))
            assert tuple(empty.tokens.shape) == (shape[0], shape[1] + 1), f"shape of {shape}"
            assert (empty.tokens >= 0).all(), "one token without drafts"
    for field in ("tokens", "num_accepted", "status", "node_ids"):
        assert torch.equal(getattr(got, field).cpu(), getattr(expected, field)), f"{field} must be equal"
    assert expected.num_accepted.max() > 0, "some path must stand"


@on_device
def test_nodes_of_trees(device):
    """Keys and paths, of more nodes than a block of the kernel, and of parents that are none."""
    b, n = 5, 140
    parents = torch.stack([torch.randint(0, j + 1, (b,)) for j in range(n)], 1)
    parents[0] = torch.arange(n)  # a chain
    tokens, lse = torch.randint(0, 3, (b, n + 1)), torch.randn(b, n + 1)
    drafts = torch.randint(-2, 5, (b, n)).where(torch.rand(b, n) < 0.2, tokens.gather(1, parents))
    drafts[0] = tokens[0, :-1]
    drafts[0, 0], drafts[3, 100:] = 2**40, 2**40
    tokens[0, 0] = 2**40
    lse[1, 0], lse[0, 100], lse[0, 20], lse[0, 132] = -INF, INF, NAN, -INF
    parents[4, ::3], parents[4, 1::7] = -1, torch.arange(1, n, 7) + 1
    logprob = torch.randn(b, n + 1)
    for name, *args in (
        ("accept_path", tokens, logprob, lse, drafts, parents, 4),
        ("accept_path", tokens[:, :1], logprob[:, :1], lse[:, :1], drafts[:, :0], parents[:, :0], 4),
        ("accept_path", tokens[:, :2], logprob[:, :2], lse[:, 1:3], torch.tensor([[-1], [4], [-2], [0], [3]]),
         parents[:, :1], 4),
        ("accept_path", *(x[:0] for x in (tokens, logprob, lse, drafts, parents)), 4),
        ("tree_keys", randfuse.key(3), None, parents),
        ("tree_keys", tokens[:, 0], tokens[:, 0] - 2**62, parents),
        ("tree_keys", randfuse.key(3), None, parents[:, :127]),
    ):  # fmt: skip
        got, expected = op(name)(*(moved(x, device) for x in args)), randfuse.reference.FUNCTIONS[name](*args)
        got, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected))
        for k, (a, e) in enumerate(zip(got, expected, strict=True)):
            same_bits(a.cpu(), e, f"{name}: result {k}")
        if args[0].shape == lse.shape:
            assert expected[1][0] == 132, "a path of several blocks"
            assert expected[3][0] == 8 + 4 + 2 + 1, "and all bits of a status"
    for args, message in (
        ((tokens, logprob, lse, drafts, parents[:, 1:], 4), "accept_path: draft_token_ids must have shape"),
        ((tokens, logprob, lse.double(), drafts, parents, 4), "accept_path: logsumexp must be"),
        ((randfuse.key(0), tokens, parents), "tree_keys: positions must have shape"),
        ((tokens[0], None, parents), r"tree_keys: key must have shape \(\) or \(B,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            op(message.split(":")[0])(*(moved(x, device) for x in args))


@on_device
def test_refusals(device):
    one, key, rest = torch.ones((), device=device), randfuse.key(2, device), (0.1, 0.3, *[None] * 4)
    target, ids, draft = (x.to(device) for x in step(3, 2, 30))
    run, none = op("speculative_accept"), [None] * 5
    for change, error, message in (
        ({"mode": "best"}, ValueError, "mode must be 'token', 'block', 'match' or 'typical', got 'best'"),
        ({"target": target.double()}, TypeError, "target_logits must be float32, float16 or bfloat16 in Triton"),
        ({"target": target[0]}, ValueError, r"target_logits must have shape \(B, K\+1, V\), or \(rows, V\)"),
        ({"ids": ids.int()}, TypeError, "draft_token_ids must be torch.int64, got torch.int32"),
        ({"draft": draft[..., 1:]}, ValueError, r"draft_logits must have shape \(B, K, V\) = \(3, 2, 30\)"),
        ({"counts": ids[0]}, ValueError, r"num_drafts must have shape \(B,\) = \(3,\), got \(2,\)"),
    ):
        a = {"target": target, "ids": ids, "draft": draft if "target" not in change else None, "counts": None,
             "mode": "token"} | change  # fmt: skip
        with pytest.raises(error, match=f"^speculative_accept: {message}"):
            run(a["target"], a["ids"], key, a["draft"], a["counts"], None, one, *none, a["mode"], *rest)
