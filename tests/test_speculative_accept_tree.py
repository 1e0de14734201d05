"""speculative_accept_tree: chains are mode match, greedy trees are walks, the law is the target's for any tree."""

from __future__ import annotations

import math
import sys

import pytest
import randfuse
import torch
from randfuse import (
    _backends,
    _sampling,
    categorical_sample,
    categorical_sample_with_stats,
    fold_in,
    reference,
    speculative_accept,
    speculative_accept_tree,
    use_backend,
)
from randfuse.testing import assert_bitwise_equal
from test_speculative_accept import key_of
from test_speculative_law import ALPHA, Models, p_value
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("tensors_lie_with_the_kernels")


def test_a_chain_is_mode_match(device):
    b, n, vocab = 8, 3, 1100
    target = torch.randn(b, n + 1, vocab) * 2
    key, positions = randfuse.split(key_of(1), b), torch.arange(b) * 9
    of_places = fold_in(key.unsqueeze(-1), positions.unsqueeze(-1) + torch.arange(n)).reshape(-1)
    ids = categorical_sample(target[:, :n] + torch.randn(b, n, vocab) * 0.3, method="race", key=of_places)
    ids[0, 1], ids[1, 0] = -1, vocab
    shared = {"temperature": torch.linspace(0, 1.5, b), "top_p": 0.95, "key": key, "positions": positions}
    tree = speculative_accept_tree(target, ids, torch.arange(n).expand(b, n), **shared)
    chain = speculative_accept(target, ids, mode="match", **shared)
    for field in ("tokens", "num_accepted", "status"):
        assert_bitwise_equal(getattr(tree, field), getattr(chain, field), name=field)
    torch.testing.assert_close(tree.logprobs, chain.logprobs)
    assert_bitwise_equal(tree.node_ids, torch.arange(n + 1).where(tree.tokens >= 0, -1))
    assert int(tree.num_accepted.sum()) > 4


def test_greedy_walk_over_a_tree(device):
    """Nodes 1, 2 hang on the root, 3, 4 on 2, 5 on 3; the largest logits lead 0 -> 2 -> 4."""
    parents = torch.tensor([[0, 0, 2, 2, 3]])
    ids = torch.tensor([[7, 5, 1, 3, 0]])
    target = torch.zeros(1, 6, 2000)
    target[0, torch.arange(6), torch.tensor([5, 9, 3, 1, 1999, 2])] = 1.0
    got = speculative_accept_tree(target, ids, parents, temperature=0.0)
    assert got.tokens.tolist() == [[5, 3, 1999, -1, -1, -1]]
    assert got.node_ids.tolist() == [[0, 2, 4, -1, -1, -1]]
    assert got.num_accepted.tolist() == [2]


def test_duplicates_the_first_is_followed(device):
    parents, ids = torch.tensor([[0, 0, 2, 1]]), torch.tensor([[5, 5, 6, 6]])
    target = torch.zeros(1, 5, 20)
    target[0, torch.arange(5), torch.tensor([5, 6, 6, 8, 9])] = 1.0
    got = speculative_accept_tree(target, ids, parents, temperature=0.0)
    assert got.node_ids.tolist() == [[0, 1, 4, -1, -1]]
    assert got.tokens.tolist() == [[5, 6, 9, -1, -1]]


def grown(models: Models, text: torch.Tensor, parents: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """(n, nodes, V) target logits of the tree below `text` whose drafts are tokens (n, N)."""
    paths = [text]
    for j, parent in enumerate(parents):
        paths.append(torch.cat([paths[parent], tokens[:, j : j + 1]], -1))
    return torch.stack([models.rows(models.p_logits, path) for path in paths], 1)


@pytest.mark.parametrize("drafts", ["fixed", "random, coupled and twice"])
def test_joint_law_over_three_steps(drafts):
    """A tree of depth 2 with twins: three tokens, in as many steps as needed under one key, have the target's law."""
    n, length, models = 2**14, 3, Models(3, 7, seed=4, spread=0.7)
    parents = [0, 0, 0, 1, 2, 2]
    keys = randfuse.split(key_of(6), n)
    text, done = torch.full((n, 12), -1), torch.zeros(n, dtype=torch.int64)
    with use_backend("auto"):
        for t in range(length):
            at = (done == t).nonzero().squeeze(-1)
            tokens = torch.tensor([0, 1, 1, 2, 0, 2]).expand(len(at), -1)
            if drafts != "fixed":  # the draws of the target's own noise at other logits
                draft = models.rows(models.q_logits, text[at, :t]).unsqueeze(1).expand(-1, 6, -1)
                depth = torch.tensor([0, 0, 0, 1, 1, 1])
                tokens = categorical_sample(draft, method="race", key=fold_in(keys[at, None], t + depth).reshape(-1))
            got = speculative_accept_tree(
                grown(models, text[at, :t], parents, tokens), tokens, torch.tensor(parents).expand(len(at), -1),
                key=keys[at], positions=torch.full((len(at),), t),
            )  # fmt: skip
            text[at, t : t + 7] = got.tokens
            done[at] = t + got.num_accepted + 1
            assert t > 0 or float(got.num_accepted.double().mean()) > 0.2
    assert (done >= length).all()
    index = text[:, 0] * 9 + text[:, 1] * 3 + text[:, 2]
    law = models.text_law(length).reshape(-1)
    assert p_value(torch.bincount(index, minlength=27), law) > ALPHA
    assert p_value(torch.bincount(index.roll(1) // 9 * 9 + index % 9, minlength=27), law) < ALPHA, "control"


def random_trees(b: int, n: int, vocab: int):
    """Trees of any shape with twins and ids that are none, and rows of every kind."""
    target = torch.randn(b, n + 1, vocab) * 2
    target[0, 0, 1], target[1, 0], target[2, 2, 3] = math.nan, -math.inf, math.inf
    parents = torch.stack([torch.randint(0, j + 1, (b,)) for j in range(n)], 1)
    return target, torch.randint(-2, vocab + 1, (b, n)), parents


def test_the_walk_of_the_host_is_the_path_among_all_draws(device, monkeypatch):
    """What a GPU and compiled code do gives the same result."""
    for trial in range(4):
        args = random_trees(7, 9, 6)
        shared = {"top_p": 0.9, "temperature": torch.linspace(0, 2, 7), "key": key_of(trial)}
        walked = speculative_accept_tree(*args, **shared)
        with monkeypatch.context() as m:
            m.setattr(_sampling, "readable", lambda x: False)
            found = speculative_accept_tree(*args, **shared)
        for field, a, e in zip(walked._fields, found, walked, strict=True):
            assert_bitwise_equal(a, e, name=field)


def test_the_integers_equal_the_reference(kernels_device):
    """Keys and paths of trees of every shape, with draws that follow them down."""
    for trial, (b, n) in enumerate([(5, 1), (64, 12), (3, 300), (2, 0)]):
        parents = torch.stack([torch.randint(0, j + 1, (b,)) for j in range(n)], 1) if n else torch.empty(b, 0).long()
        if trial == 2:
            parents = torch.arange(n).expand(b, n)  # a chain that is longer than a block of the kernel
        tokens, drafts = torch.randint(0, 3, (b, n + 1)), torch.randint(-2, 5, (b, n))
        drafts = drafts.where(torch.rand(b, n) < 0.2, tokens.gather(1, parents))
        drafts[:1] = tokens[:1].gather(1, parents[:1])  # all agree
        lse = torch.randn(b, n + 1)
        lse[1::3, 0], lse[::7, n // 2], lse[2::3, n // 3] = -math.inf, math.inf, math.nan
        tensors = [x.to(kernels_device) for x in (tokens, torch.randn(b, n + 1), lse, drafts, parents)]
        for name, *args in (
            ("accept_path", *tensors, 4),
            ("tree_keys", key_of(3), None, tensors[-1]),
            ("tree_keys", tensors[0][:, 0], tensors[0][:, 0] - 2**62, tensors[-1]),
        ):
            got, expected = _backends.call(name, *args), reference.FUNCTIONS[name](*args)
            for a, e in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected)), strict=True):
                assert_bitwise_equal(a, e, name=f"{name} of {n} drafts")


def test_the_key_of_a_node_is_that_of_its_depth(device):
    parents, positions = torch.tensor([[0, 1, 0], [0, 0, 2]], device=device), torch.tensor([5, -9], device=device)
    key, depth = key_of(3), torch.tensor([[0, 1, 2, 1], [0, 1, 1, 2]], device=device)
    own = fold_in(key, torch.arange(2, device=device)).unsqueeze(-1)
    expected = fold_in(own, positions.unsqueeze(-1) + depth)
    assert_bitwise_equal(_backends.call("tree_keys", key, positions, parents), expected, name="keys")


def test_two_small_ops_stand_around_the_draws(monkeypatch):
    """What a GPU and compiled code run: no chain of tiny launches."""
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op.name())
            return op(*args, **(kwargs or {}))

    args, key = random_trees(7, 9, 6), key_of(0)
    monkeypatch.setattr(_sampling, "readable", lambda x: False)
    with use_backend("auto"), Seen():
        speculative_accept_tree(*args, key=key)
    views = {"aten::view", "aten::unsqueeze", "aten::expand", "aten::detach", "aten::_unsafe_view"}
    names = [name for name in seen if name not in views]
    assert names[0] == "aten::full", "the temperature, on the CPU"
    own = ["tree_keys", "categorical_sample_with_stats", "accept_path"]
    assert [name.removeprefix("randfuse::") for name in names[1:]] == own


@pytest.mark.parametrize("shared", [True, False], ids=["one key", "a key each"])
def test_vmap_is_a_loop(device, shared):
    trees = [torch.stack(x) for x in zip(*(random_trees(3, 5, 6) for _ in range(4)), strict=True)]
    keys, positions = randfuse.split(key_of(1), 4), torch.arange(12).reshape(4, 3)
    key = keys[0] if shared else keys

    def verify(target, ids, parents, key, positions):
        return tuple(speculative_accept_tree(target, ids, parents, key=key, positions=positions))

    got = torch.vmap(verify, in_dims=(0, 0, 0, None if shared else 0, 0))(*trees, key, positions)
    for n in range(4):
        alone = verify(*(x[n] for x in trees), key if shared else key[n], positions[n])
        for a, e in zip(got, alone, strict=True):
            assert_bitwise_equal(a[n], e, name=f"element {n}")


def test_compiles_as_one_graph():
    args, key = random_trees(7, 9, 6), key_of(0)
    compiled = torch.compile(speculative_accept_tree, backend="aot_eager", fullgraph=True)(*args, key=key)
    for field, a, e in zip(compiled._fields, compiled, speculative_accept_tree(*args, key=key), strict=True):
        assert_bitwise_equal(a, e, name=field)


def test_only_rows_on_the_path_are_read(device, monkeypatch):
    if device != "cpu":
        pytest.skip("a GPU draws at all nodes")
    module, read = sys.modules["randfuse.ops.speculative_accept_tree"], []

    def recorded(logits, *args, rows, **kwargs):
        read.append(rows.tolist())
        return categorical_sample_with_stats(logits, *args, rows=rows, **kwargs)

    monkeypatch.setattr(module, "categorical_sample_with_stats", recorded)
    target = torch.zeros(2, 5, 20)
    target[:, torch.arange(5), torch.tensor([5, 9, 3, 1, 7])] = 1.0
    ids, parents = torch.tensor([[7, 5, 1, 3], [0, 1, 2, 3]]), torch.tensor([0, 0, 1, 2]).expand(2, 4)
    got = speculative_accept_tree(target, ids, parents, temperature=0.0)
    assert got.node_ids.tolist() == [[0, 2, 4, -1, -1], [0, -1, -1, -1, -1]]
    assert read == [[0, 5], [2], [4]], "a call a depth, of requests still under way"


def test_empty_batches(device):
    none = torch.empty(0, 2, dtype=torch.int64)
    got = speculative_accept_tree(torch.empty(0, 3, 5), none, none)
    assert [tuple(t.shape) for t in got] == [(0, 3), (0,), (0, 3), (0,), (0, 3)]


def test_no_drafts_bad_ids_and_rows_without_support(device):
    got = speculative_accept_tree(torch.randn(3, 1, 40), torch.empty(3, 0).long(), torch.empty(3, 0).long())
    assert got.tokens.shape == (3, 1)
    assert (got.tokens >= 0).all()
    target = torch.zeros(1, 3, 40)
    target[0, 0, 1:] = -math.inf
    target[0, 1] = -math.inf
    got = speculative_accept_tree(target, torch.tensor([[0, 0]]), torch.tensor([[0, 1]]))
    assert got.tokens.tolist() == [[0, 0, -1]]
    assert got.num_accepted.tolist() == [1]
    assert got.status.tolist() == [4]
    got = speculative_accept_tree(target[:, [0, 2, 2]], torch.tensor([[99, 3]]), torch.tensor([[0, 1]]))
    assert got.status.tolist() == [8]
