"""Drop-ins for FlashInfer's, SGLang's, vLLM's and transformers' verification: law, greedy equality, outputs, errors.

Chi-square tests fail by chance once in 10^6 each.
"""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from randfuse.integrations import flashinfer, sglang, vllm
from test_categorical_law import ALPHA, chi_square_p

N, K, V = 2**14, 2, 4  # requests, drafts, tokens
P = torch.tensor([[0.10, 0.60, 0.20, 0.10], [0.40, 0.10, 0.40, 0.10], [0.25, 0.05, 0.30, 0.40]])  # of each place
Q = torch.tensor([[0.30, 0.20, 0.10, 0.40], [0.10, 0.10, 0.20, 0.60]])


def parameters(f) -> list[str]:
    return list(inspect.signature(f).parameters)


def drafted(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([q.multinomial(N, replacement=True, generator=g) for q in Q], 1)


def follows(tokens: torch.Tensor, laws=P) -> bool:
    """Whether every token has the law of its place, which does not depend on the tokens before it."""
    emitted = [column[column >= 0] for column in tokens.T]
    return all(
        chi_square_p(e.long().bincount(minlength=V), p.double()) > ALPHA for e, p in zip(emitted, laws, strict=True)
    )


def overlap(p=P, q=Q) -> torch.Tensor:
    return torch.minimum(p[:K], q).sum(-1)


def near(count: torch.Tensor, p: torch.Tensor, n: int = N) -> bool:
    """Six sigma: once in 5·10^8."""
    return bool(((count / n - p).abs() < 6 * (p * (1 - p) / n).sqrt()).all())


# FlashInfer.


def test_flashinfer():
    names = ["draft_probs", "draft_token_ids", "target_probs", "maybe_output_accepted_token_num",
             "maybe_output_emitted_draft_token_num", "deterministic", "generator", "seed", "offset"]  # fmt: skip
    assert parameters(flashinfer.chain_speculative_sampling) == names
    ids = drafted().int()
    laws = (Q * 3).expand(N, K, V), ids, P.expand(N, K + 1, V)
    accepted, emitted = torch.full((2, N), 7, dtype=torch.int32)
    tokens, *counts = flashinfer.chain_speculative_sampling(*laws, accepted, emitted, seed=3, offset=5)
    assert counts[0] is accepted
    assert counts[1] is emitted
    assert tokens.dtype == torch.int32
    assert follows(tokens)
    assert torch.equal((tokens >= 0).sum(-1), emitted - 7 + 1)
    assert torch.equal((tokens[:, :K] == ids)[:, 0] | (emitted == 7), torch.ones(N, dtype=torch.bool))
    one, two = overlap()
    assert (accepted >= emitted).all()
    assert near((accepted - 7).sum() / 2, (one + two) / 2)  # each draft by itself
    assert near((accepted > emitted).sum(), (1 - one) * two)
    u = flashinfer._coins(flashinfer._key(3, 5, ids.device), N, K)
    stands = torch.stack([u[:, j] * Q[j][ids[:, j]] < P[j][ids[:, j]] for j in range(K)], -1)
    assert torch.equal(stands.cumprod(-1).sum(-1), emitted - 7)  # the coins are those of the op
    again = flashinfer.chain_speculative_sampling(*laws, seed=3, offset=5)
    assert torch.equal(tokens, again[0])
    assert torch.equal(again[1], accepted - 7)
    assert not torch.equal(tokens, flashinfer.chain_speculative_sampling(*laws, seed=3, offset=6)[0])
    assert not follows(flashinfer.chain_speculative_sampling(Q.roll(1, -1).expand(N, K, V), *laws[1:])[0])


def test_flashinfer_greedy_padding_and_errors():
    target = torch.eye(V)[torch.tensor([[1, 2, 3]])]
    ids = torch.tensor([[1, 0]])
    tokens, accepted, emitted = flashinfer.chain_speculative_sampling(torch.eye(V)[ids], ids, target)
    assert (tokens.tolist(), accepted.tolist(), emitted.tolist()) == ([[1, 2, -1]], [1], [1])
    padded = torch.tensor([[1, -1]])
    tokens, accepted, emitted = flashinfer.chain_speculative_sampling(torch.eye(V)[padded.clamp(min=0)], padded, target)
    assert (tokens.tolist(), accepted.tolist(), emitted.tolist()) == ([[1, 2, -1]], [1], [1])
    with pytest.raises(TypeError, match="maybe_output_accepted_token_num"):
        flashinfer.chain_speculative_sampling(torch.eye(V)[ids], ids, target, torch.zeros(1))
    with pytest.raises(ValueError, match="maybe_output_emitted_draft_token_num"):
        flashinfer.chain_speculative_sampling(torch.eye(V)[ids], ids, target, None, torch.zeros(2, dtype=torch.int32))


def test_flashinfer_greedy_and_padded_requests_among_others():
    """Every fourth request greedy, that is with one-hot laws, every third without its second draft."""
    ids, greedy = drafted(), torch.arange(N) % 4 == 0
    ids[::3, 1] = -1
    best = P.argmax(-1)
    target = torch.where(greedy[:, None, None], torch.eye(V)[best], P)
    draft = torch.where(greedy[:, None, None], torch.eye(V)[ids.clamp(min=0)], Q)
    tokens, _, emitted = flashinfer.chain_speculative_sampling(draft, ids, target, seed=2)
    assert follows(tokens[~greedy])
    assert (emitted[::3] <= 1).all()
    stand = (ids == best[:K]).long().cumprod(-1).sum(-1)
    assert torch.equal(emitted[greedy].long(), stand[greedy])
    place = torch.arange(K + 1)
    assert torch.equal(tokens[greedy].long(), best.where(place <= stand[greedy].unsqueeze(-1), -1))


# SGLang. The tree: 0 → (1, 2, 4), 1 → 3, 4 → 5; links of children go 4, 1, 2.

CHILD, SIBLING = torch.tensor([4, 3, -1, -1, 5, -1]), torch.tensor([-1, 2, -1, -1, 1, -1])


def verify_tree(target, candidates, coins, steps=4, links=None, **kwargs):
    b, n = candidates.shape
    slots = torch.arange(b * n, dtype=torch.int32).reshape(b, n)
    out = (torch.full((b * n,), -1, dtype=torch.int32), torch.full((b, steps), -1, dtype=torch.int32),
           torch.zeros(b, dtype=torch.int32))  # fmt: skip
    links = links or (CHILD[:n].where(CHILD[:n] < n, -1).expand(b, n), SIBLING[:n].expand(b, n))
    sglang.tree_speculative_sampling_target_only(*out, candidates, slots, *links, *coins, target,
                                                 torch.zeros_like(target), **kwargs)  # fmt: skip
    return out


def coins_of(b, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, n, generator=g), torch.rand(b, generator=g)


def test_sglang_law():
    """Candidates 1, 1 (a duplicate) and 2 below the root: the law at each depth is the target's."""
    names = ["predicts", "accept_index", "accept_token_num", "candidates", "retrive_index", "retrive_next_token",
             "retrive_next_sibling", "uniform_samples", "uniform_samples_for_final_sampling", "target_probs",
             "draft_probs", "threshold_single", "threshold_acc", "deterministic"]  # fmt: skip
    assert parameters(sglang.tree_speculative_sampling_target_only) == names
    depth = torch.tensor([0, 1, 1, 2, 1, 2])
    candidates = torch.tensor([[0, 1, 1, 0, 2, 3]], dtype=torch.int32).expand(N, -1)
    target = P[depth].expand(N, -1, -1)
    predicts, index, count = verify_tree(target, candidates, coins_of(N, 6))
    text = torch.where(index >= 0, predicts[index.clamp(min=0).long()], -1)
    assert follows(text[:, :3])
    assert torch.equal((index >= 0).sum(-1), count + 1)
    assert near((count > 0).sum(), P[0, 1] + P[0, 2])
    nodes = index - 6 * torch.arange(N).unsqueeze(-1)
    inner = nodes[count > 0]
    assert torch.equal(candidates[0][inner[:, 1].long()], text[count > 0][:, 0])  # the draft that stands was drawn
    assert set(map(tuple, nodes[count == 2][:, :3].tolist())) == {(0, 1, 3), (0, 4, 5)}
    again = verify_tree(target, candidates, coins_of(N, 6))
    assert all(map(torch.equal, again, (predicts, index, count)))
    coins = coins_of(N, 6)
    for other in ((coins[0].flip(-1), coins[1]), (coins[0], coins[1].flip(0))):
        assert not torch.equal(verify_tree(target, candidates, other)[0], predicts)
    short = verify_tree(target, candidates, coins_of(N, 6), steps=2)
    assert torch.equal(short[1], index[:, :2])
    assert torch.equal(short[2], count.clamp(max=1))


def test_sglang_trees_of_several_shapes_and_greedy_requests_in_a_batch():
    """Odd requests have the root's first two children only, the other nodes are padding; every fourth is greedy."""
    odd, greedy = torch.arange(N) % 2 == 1, torch.arange(N) % 4 == 0
    small = torch.tensor([1, -1, -1, -1, -1, -1]), torch.tensor([-1, 2, -1, -1, -1, -1])
    links = [torch.where(odd.unsqueeze(-1), few, all_) for few, all_ in zip(small, (CHILD, SIBLING), strict=True)]
    candidates = torch.tensor([[0, 1, 3, 0, 2, 3]], dtype=torch.int32).expand(N, -1)
    laws = P[torch.tensor([0, 1, 1, 2, 1, 2])]
    target = torch.where(greedy[:, None, None], torch.eye(V)[laws.argmax(-1)], laws)
    predicts, index, count = verify_tree(target, candidates, coins_of(N, 6), links=links)
    text = torch.where(index >= 0, predicts[index.clamp(min=0).long()], -1)
    assert follows(text[~greedy & ~odd][:, :3])
    assert follows(text[odd][:, :2], P[:2])
    assert (count[odd] <= 1).all()
    assert set((index % 6)[odd & (count > 0)][:, 1].tolist()) == {1, 2}
    assert near((count[odd] > 0).sum(), P[0, 1] + P[0, 3], int(odd.sum()))
    assert text[greedy].unique(dim=0).tolist() == [[1, 0, 3, -1]]  # nodes 0, 1, 3


def test_sglang_greedy_walk_and_errors():
    candidates = torch.tensor([[0, 1, 2, 0, 3, 2]], dtype=torch.int32)
    target = torch.eye(V)[torch.tensor([[3, 0, 0, 0, 2, 1]])]
    predicts, index, count = verify_tree(target, candidates, coins_of(1, 6))
    assert (index.tolist(), count.tolist()) == ([[0, 4, 5, -1]], [2])
    assert predicts.tolist() == [3, -1, -1, -1, 2, 1]
    candidates = torch.tensor([[0, 3, 2, 0]], dtype=torch.int32)  # the root's links begin at node 4, which is cut off
    assert verify_tree(target[:, :4], candidates, coins_of(1, 4))[2].tolist() == [0]
    with pytest.raises(ValueError, match="thresholds must be 1"):
        verify_tree(target[:, :4], candidates, coins_of(1, 4), threshold_acc=0.5)
    with pytest.raises(TypeError, match="uniform_samples must be float32"):
        verify_tree(target[:, :4], candidates, (torch.rand(1, 4).double(), torch.rand(1)))


# vLLM.


def packed(ids, temperature=1.0, seed=0):
    """Requests that own slots in reverse order, one more slot than requests."""
    n = len(ids)
    cu = torch.arange(n + 1, dtype=torch.int32) * (K + 1)
    slots = torch.arange(n, 0, -1, dtype=torch.int32)
    sampled = torch.nn.functional.pad(ids, (1, 0)).flatten()
    return sampled, cu, torch.arange(K + 1).repeat(n) + 9, slots, slots.repeat_interleave(K + 1), \
        torch.arange(K + 1).repeat(n), torch.full((n + 1,), temperature), torch.arange(n + 1) + seed, K  # fmt: skip


@pytest.mark.parametrize("block", [False, True])
def test_vllm(block):
    names = ["target_logits", "draft_logits", "draft_sampled", "cu_num_logits", "pos", "idx_mapping",
             "expanded_idx_mapping", "expanded_local_pos", "temperature", "seed", "num_speculative_steps",
             "synthetic_conditional_rates", "use_fp64", "use_block_verification"]  # fmt: skip
    assert parameters(vllm.rejection_sample) == names
    ids = drafted()
    target = P.log().repeat(N, 1)
    wide = torch.nn.functional.pad(Q.log(), (0, 3))  # padding of the drafter's vocabulary
    for draft in (wide.expand(N + 1, K, V + 3), None):
        args = packed(ids if draft is not None else torch.ones_like(ids), temperature=0.6)
        sampled, count = vllm.rejection_sample(target, draft, *args, use_block_verification=block)
        assert sampled.shape == (N, K + 1)
        assert count.dtype == torch.int32
        assert follows(sampled)
        assert torch.equal((sampled >= 0).sum(-1), count)
        if draft is not None:  # block verification lets more stand, never less
            assert near((count > K).sum(), overlap().prod()) is not block
            assert block or near((count > 1).sum(), overlap()[0])


def test_vllm_slots_padding_greedy_and_errors():
    ids, target = drafted()[:3], P.log().repeat(3, 1)
    args = packed(ids, temperature=0.0)
    sampled, count = vllm.rejection_sample(target, None, *args)
    best = P.argmax(-1)
    for row, n, draft in zip(sampled, count, ids, strict=True):
        stand = int((draft == best[:K]).cumprod(-1).sum())
        assert n == stand + 1
        assert torch.equal(row[:n], best[:n])
    # The draft logits of a request are those of its slot: where its draft is the drafter's only token, u < p decides.
    draft = torch.full((4, K, V), -torch.inf).scatter(-1, ids.flip(0)[[0, 0, 1, 2]].unsqueeze(-1), 0.0)
    own = vllm.rejection_sample(target, draft, *packed(ids))
    assert torch.equal(own[0], vllm.rejection_sample(target, None, *packed(ids))[0])
    # A request without rows, as padding of a graph: nothing for it, and nothing changes for the others.
    more = list(packed(ids))
    more[1], more[3] = torch.cat([more[1], more[1][-1:]]), torch.cat([more[3], more[3].new_zeros(1)])
    sampled, count = vllm.rejection_sample(target, draft, *more)
    assert torch.equal(sampled[:3], own[0])
    assert sampled[3].tolist() == [-1] * (K + 1)
    assert count[3] == 0
    with pytest.raises(NotImplementedError, match="synthetic_conditional_rates"):
        vllm.rejection_sample(target, None, *args, synthetic_conditional_rates=torch.ones(K))


@pytest.mark.parametrize("block", [False, True])
def test_vllm_ragged_and_mixed(block):
    """Requests of 0, 1 and 2 drafts, every fourth greedy, every fifth with -1 in place of its first draft."""
    ids, counts, place = drafted(), torch.arange(N) % (K + 1), torch.arange(K + 1)
    greedy, hollow = torch.arange(N) % 4 == 0, torch.arange(N) % 5 == 0
    ids[hollow, 0] = -1
    rows = place <= counts.unsqueeze(-1)
    cu = torch.nn.functional.pad((counts + 1).cumsum(0), (1, 0)).int()
    slots = torch.arange(N, 0, -1, dtype=torch.int32)
    temperature = torch.ones(N + 1).scatter(0, slots[greedy].long(), 0.0)
    sampled, count = vllm.rejection_sample(
        P.expand(N, -1, -1)[rows].log(), Q.log().expand(N + 1, K, V), torch.nn.functional.pad(ids, (1, 0))[rows], cu,
        (place + 9).expand(N, -1)[rows], slots, slots.unsqueeze(-1).expand(-1, K + 1)[rows], place.expand(N, -1)[rows],
        temperature, torch.arange(N + 1), K, use_block_verification=block,
    )  # fmt: skip
    assert torch.equal((sampled >= 0).sum(-1), count)
    assert (count <= counts + 1).all()
    assert (count[hollow] == 1).all()
    free = ~greedy & (counts == K)
    assert follows(sampled[~greedy]) if not block else follows(sampled[free][:, :1], P[:1])
    assert near((count[free & ~hollow] > K).sum(), overlap().prod(), int((free & ~hollow).sum())) is not block
    best = P.argmax(-1)
    stand = ((ids == best[:K]) & rows[:, 1:]).long().cumprod(-1).sum(-1)
    assert torch.equal(sampled[greedy], best.where(place <= stand.unsqueeze(-1), -1)[greedy])


def metadata(temperature=None, generators=None):
    greedy = temperature is None
    some = not greedy and bool((temperature == 0).any())
    return SimpleNamespace(temperature=temperature, all_greedy=greedy, all_random=not greedy and not some,
                           generators=generators or {})  # fmt: skip


@pytest.mark.parametrize("one_hot", [False, True])
def test_vllm_v1(one_hot):
    names = ["draft_token_ids", "num_draft_tokens", "max_spec_len", "cu_num_draft_tokens", "draft_probs",
             "target_logits", "bonus_token_ids", "sampling_metadata"]  # fmt: skip
    assert parameters(vllm.rejection_sample_v1) == names
    torch.manual_seed(1)  # not that of the drafts, which the bonus would follow
    ids = torch.ones(N, K, dtype=torch.int32) if one_hot else drafted().int()
    bonus = P[K].multinomial(N, replacement=True).unsqueeze(-1).int()
    out = vllm.rejection_sample_v1(
        ids.flatten(), [K] * N, K, torch.arange(1, N + 1, dtype=torch.int32) * K, None if one_hot else Q.repeat(N, 1),
        P[:K].log().repeat(N, 1), bonus, metadata(torch.full((N,), 0.7)),
    )  # fmt: skip
    assert out.dtype == torch.int32
    assert out.shape == (N, K + 1)
    assert follows(out)
    whole = out[:, K] >= 0
    assert torch.equal(out[whole][:, :K], ids[whole])
    assert torch.equal(out[whole][:, K:], bonus[whole])
    assert near(whole.sum(), P[0, 1] * P[1, 1] if one_hot else overlap().prod())


def test_vllm_v1_ragged_and_mixed():
    """The law in a batch of 0, 1 and 2 drafts a request, of which every fourth is greedy."""
    torch.manual_seed(1)
    ids, counts, place = drafted().int(), torch.arange(N) % (K + 1), torch.arange(K)
    greedy, rows = torch.arange(N) % 4 == 0, place < counts.unsqueeze(-1)
    best = P.argmax(-1)
    bonus = torch.where(greedy, best[counts], P[counts].multinomial(1).squeeze(-1)).int().unsqueeze(-1)
    out = vllm.rejection_sample_v1(
        ids[rows], counts.tolist(), K, counts.cumsum(0).int(), Q.expand(N, K, V)[rows], P.expand(N, -1, -1)[:, :K][rows]
        .log(), bonus, metadata(torch.where(greedy, 0.0, 0.7)),
    )  # fmt: skip
    assert follows(out[~greedy])
    assert ((out >= 0).sum(-1) <= counts + 1).all()
    stand = ((ids == best[:K]) & rows).long().cumprod(-1).sum(-1)
    assert torch.equal(out[greedy].long(), best.where(torch.arange(K + 1) <= stand.unsqueeze(-1), -1)[greedy])


def test_vllm_v1_ragged_greedy_and_generators():
    """Requests of 2, 0 and 1 drafts; the last greedy, the first with a generator."""
    ids, cu = torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([2, 2, 3], dtype=torch.int32)
    logits, bonus = P[[0, 1, 2]].log(), torch.tensor([[3], [2], [1]], dtype=torch.int32)

    def run(meta, drafts=ids):
        return vllm.rejection_sample_v1(drafts, [2, 0, 1], 4, cu, None, logits, bonus, meta)

    assert run(metadata()).tolist() == [[1, 0, -1, -1, -1], [2, -1, -1, -1, -1], [3, 1, -1, -1, -1]]
    texts = []
    for seed in range(20):
        torch.manual_seed(seed)
        temperature = torch.tensor([1.0, 1.0, 0.0])
        texts.append(run(metadata(temperature, {0: torch.Generator().manual_seed(5)})))
        assert texts[-1][1:].tolist() == [[2, -1, -1, -1, -1], [3, 1, -1, -1, -1]]
        assert torch.equal(texts[-1][0], texts[0][0])
    assert len({tuple(run(metadata(torch.ones(3)))[0].tolist()) for _ in range(20)}) > 1
    none = torch.zeros(3, dtype=torch.int32)
    out = vllm.rejection_sample_v1(ids[:0], [0] * 3, 4, none, None, logits[:0], bonus, metadata(torch.ones(3)))
    assert torch.equal(out[:, :1], bonus)
    assert (out[:, 1:] == -1).all()


# Transformers.


@pytest.fixture
def switched():
    pytest.importorskip("transformers", reason="pip install randfuse[peft]")
    integration = importlib.import_module("randfuse.integrations.transformers")
    integration.enable()
    yield integration
    integration.disable()


def test_transformers_law(switched):
    from transformers.generation import utils

    torch.manual_seed(0)
    text = torch.tensor([[5, 6]])
    p, q = P.log().unsqueeze(0), Q.log().unsqueeze(0)
    ids = drafted()[:4096]
    out = torch.full((len(ids), K + 1), -1)
    for row, draft in zip(out, ids, strict=True):
        tokens, n = utils._speculative_sampling(torch.cat([text, draft.unsqueeze(0)], -1), q, K, p)
        assert tokens.shape == (1, n + 1)
        assert torch.equal(tokens[0, :n], draft[:n])
        row[: n + 1] = tokens[0]
    assert follows(out)
    assert near((out[:, 1] >= 0).sum(), overlap()[0], len(out))


@pytest.mark.filterwarnings("ignore")
def test_transformers_generate(switched, monkeypatch):
    import transformers
    from transformers.generation import utils

    def tiny(seed, layers):
        torch.manual_seed(seed)
        shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=29, num_hidden_layers=layers, max_position_embeddings=64,
                                          initializer_range=1.0, eos_token_id=None, **shape)  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    target, assistant = tiny(0, 2), tiny(1, 1)
    prompt = torch.arange(1, 6).unsqueeze(0)
    common = {"do_sample": True, "max_new_tokens": 16, "attention_mask": torch.ones_like(prompt)}
    greedy = target.generate(prompt, **{**common, "do_sample": False})
    calls = []

    def counted(*args, **kwargs):
        calls.append((args[2], int((result := switched.speculative_sampling(*args, **kwargs))[1])))
        return result

    monkeypatch.setattr(utils, "_speculative_sampling", counted)
    out = target.generate(prompt, assistant_model=assistant, top_k=1, **common)
    assert calls
    assert torch.equal(out, greedy)
    calls.clear()
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(target.generate(prompt, assistant_model=target, top_k=0, **common))
    assert calls
    assert all(drafts == stand for drafts, stand in calls)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_transformers_switch(switched, monkeypatch):
    from transformers.generation import utils

    switched.enable()
    assert utils._speculative_sampling is switched.speculative_sampling
    lossy = switched.speculative_sampling(torch.tensor([[5, 1]]), Q[:1].log().unsqueeze(0), 1, P[:2].log().unsqueeze(0),
                                          assistant_ensemble_weight=0.5)  # fmt: skip
    assert lossy[0].shape[1] == lossy[1] + 1
    switched.disable()
    assert utils._speculative_sampling is switched._original
    monkeypatch.setattr(switched, "_original", lambda candidate_input_ids, is_done_candidate: None)
    with pytest.raises(NotImplementedError, match="_speculative_sampling must take"):
        switched.enable()


def test_seeds_of_engines_share_nothing_with_drafts_of_our_sampler():
    """The drafter under FlashInfer's seed and offset, the verifier under the same: the law stands."""
    probs = [q.expand(N, V) for q in Q]
    ids = torch.stack([flashinfer.sampling_from_probs(p, seed=1, offset=j) for j, p in enumerate(probs)], 1)
    tokens = flashinfer.chain_speculative_sampling(torch.stack(probs, 1), ids, P.expand(N, -1, -1), seed=1, offset=0)[0]
    assert follows(tokens)
