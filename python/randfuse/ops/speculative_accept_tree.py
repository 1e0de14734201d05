"""`speculative_accept_tree`: a tree of drafts, verified by the target's own draw at each node.

Composed of `categorical_sample_with_stats`, so it has no reference, binding or kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks, _sampling, keys
from .categorical_sample import CategoricalStats, categorical_sample_with_stats


class AcceptedPath(NamedTuple):
    """What a step of speculative decoding with a tree emits; see `speculative_accept_tree`."""

    tokens: Tensor
    num_accepted: Tensor
    logprobs: Tensor
    status: Tensor
    node_ids: Tensor


def speculative_accept_tree(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    parents: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    bitmask: Tensor | None = None,
    positions: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> AcceptedPath:
    """Sample the target at each node by race, with noise that belongs to the node's depth, and follow the draws down.

    Equivalent to: ``node = 0``, then draw y at the node; while a child holds y, emit it and go there; emit the last y.

    Every token is the target's own draw given the text before it, so the law is the target's for any tree from any
    drafter, duplicates included, and the text is that of `categorical_sample` without drafts, bit for bit. A chain is
    mode "match" of `speculative_accept`; temperature 0 is the walk along the largest logits.

    On the CPU only rows on the path are read, one call of `categorical_sample_with_stats` a depth. On a GPU, and in
    compiled code, whether a path goes on would have to come back to the host, so all N + 1 nodes draw in one call and
    the path is found among them afterwards. The result is the same.

    Args:
        target_logits: (B, N+1, V): node 0 is the root, the text so far; node n ≥ 1 is draft n − 1.
        draft_token_ids: int64 (B, N); −1 and other ids outside [0, V) never match.
        parents: int64 (B, N): node below which draft n hangs, in [0, n]: a parent comes before its children.
        temperature, top_k, top_p, min_p: as in `categorical_sample`; numbers or tensors () or (B,).
        bitmask: int32 (B, N+1, ⌈V/32⌉), tokens that each node may emit.
        positions: int64 (B,), place in the text of the token drawn at the root, default 0. The draw at depth d has the
            key ``fold_in(key, position + d)``.
        key: int64 () or (B,), one a request; a shared one serves request b as ``fold_in(key, b)``. None draws one.

    Returns:
        Named tuple of tokens int64 (B, N+1), padded with −1; num_accepted int64 (B,), how many of them are drafts;
        logprobs (B, N+1), 0 where padded; status int64 (B,), as in `speculative_accept`, of the nodes on the path and
        their children; node_ids int64 (B, N+1), the node at which each token was drawn, padded with −1.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, value or id, named in the message.

    Miao et al., "SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and
    Verification", ASPLOS 2024 (trees; the rule here samples first and needs no law of the drafts).

    >>> target = torch.tensor([[[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])
    >>> accepted = speculative_accept_tree(target, torch.tensor([[2, 1]]), torch.tensor([[0, 0]]), temperature=0.0)
    >>> accepted.tokens, accepted.node_ids
    (tensor([[ 1,  2, -1]]), tensor([[ 0,  2, -1]]))
    """
    op = "speculative_accept_tree"
    _checks.float_tensor(op, "target_logits", target_logits)
    device = target_logits.device
    _sampling.integers(op, "draft_token_ids", draft_token_ids, torch.int64, device)
    if draft_token_ids.dim() != 2:
        raise ValueError(f"{op}: draft_token_ids must have shape (B, N), got {tuple(draft_token_ids.shape)}")
    b, n = draft_token_ids.shape
    rows = tuple(target_logits.shape[:-1])
    if rows != (b, n + 1) or not 1 <= target_logits.shape[-1] <= _sampling.MAX_VOCAB:
        raise ValueError(f"{op}: target_logits must have shape (B, N+1, V) with V in [1, 2**20], "
                         f"got {tuple(target_logits.shape)}")  # fmt: skip
    _sampling.integers(op, "parents", parents, torch.int64, device)
    _checks.shape(op, "parents", parents, (b, n), "(B, N)")
    earlier = (parents >= 0) & (parents <= torch.arange(n, device=device))
    if device.type == "cpu" and _sampling.readable(parents) and not bool(earlier.all()):
        raise ValueError(f"{op}: parents must be in [0, n] for draft n, got {parents.tolist()}")
    keys.check(op, key, generator, b, device)
    if key is not None and key.dim() and key.shape[0] != b:
        raise ValueError(f"{op}: key must have shape () or (B,) = ({b},), got {tuple(key.shape)}")
    if positions is not None:
        _sampling.integers(op, "positions", positions, torch.int64, device)
        _checks.shape(op, "positions", positions, (b,), "(B,)")
    vocab = target_logits.shape[-1]
    if bitmask is not None:
        _sampling.integers(op, "bitmask", bitmask, torch.int32, device)
        _checks.shape(op, "bitmask", bitmask, (b, n + 1, (vocab + 31) // 32), "(B, N+1, ⌈V/32⌉)")
        bitmask = bitmask.reshape(-1, bitmask.shape[-1])
    of_request = _sampling.parameters(op, (b,), device, temperature, top_k, top_p, min_p)
    warmth, *filters = (v if v is None or v.dim() == 0 else v.unsqueeze(-1).expand(b, n + 1) for v in of_request)
    key = keys.resolve(key, generator, device)
    key = keys.fold_in(key, torch.arange(b, device=device)) if key.dim() == 0 else key

    # Ancestors by doubling: after step k, `above` is 2^k nodes up (the root's is the root).
    parent = torch.nn.functional.pad(parents.where(earlier, 0), (1, 0))
    depth, above = torch.ones_like(parent), parent
    depth[:, 0] = 0
    for _ in range(n.bit_length()):
        depth, above = depth + depth.gather(1, above), above.gather(1, above)
    first = 0 if positions is None else positions.unsqueeze(-1)
    node_keys = keys.fold_in(key.unsqueeze(-1), first + depth)
    draw = partial(
        categorical_sample_with_stats, target_logits, warmth, top_k=filters[0], top_p=filters[1], min_p=filters[2],
        bitmask=bitmask, method="race", key=node_keys.reshape(-1) if b else keys.key(0, device),
    )  # fmt: skip
    if device.type == "cpu" and _sampling.readable(target_logits):
        drawn, visited = _walked(draw, draft_token_ids, parent)
    else:
        facts = draw()
        drawn = Draws(facts.tokens, facts.logprob, facts.logsumexp)
        visited = _path(drawn, draft_token_ids, parent)
    return _emit(drawn, visited, depth, parent, draft_token_ids, vocab)


class Draws(NamedTuple):
    """(B, N+1) of each node, of those that nobody looked at 0."""

    tokens: Tensor
    logprob: Tensor
    logsumexp: Tensor


def _walked(draw: Callable[..., CategoricalStats], drafts: Tensor, parent: Tensor) -> tuple[Draws, Tensor]:
    """Draws at the nodes of the paths alone and which these are, for a host that can see where a path ends."""
    b, nodes = parent.shape
    ids = torch.nn.functional.pad(drafts, (1, 0), value=-1)
    rows = torch.arange(b) * nodes
    levels: list[tuple[Tensor, CategoricalStats]] = []
    while len(rows) or not levels:
        drawn = draw(rows=rows)
        levels.append((rows, drawn))
        request, node = rows // nodes, rows % nodes
        matches = (parent[request] == node.unsqueeze(-1)) & (ids[request] == drawn.tokens.unsqueeze(-1))
        goes_on = matches.any(-1) & (drawn.logsumexp != -torch.inf)
        rows = (request * nodes + matches.int().argmax(-1))[goes_on]  # the first of equals
    seen = torch.cat([rows for rows, _ in levels])

    def whole(name: str) -> Tensor:
        values = torch.cat([getattr(drawn, name) for _, drawn in levels])
        return values.new_zeros(b * nodes).scatter(0, seen, values).view(b, nodes)

    visited = torch.zeros(b * nodes, dtype=torch.bool).scatter(0, seen, True).view(b, nodes)
    return Draws(*(whole(name) for name in Draws._fields)), visited


def _path(drawn: Draws, drafts: Tensor, parent: Tensor) -> Tensor:
    """(B, N+1) nodes that the draws lead to: of children with the drawn token the first, below nodes with support."""
    up = parent[:, 1:]
    matches = (drafts == drawn.tokens.gather(1, up)) & (drawn.logsumexp != -torch.inf).gather(1, up)
    twin = (up.unsqueeze(-1) == up.unsqueeze(-2)) & (matches.unsqueeze(-1) & matches.unsqueeze(-2))
    visited = torch.nn.functional.pad(matches & ~twin.tril(-1).any(-1), (1, 0), value=True)
    above = parent
    for _ in range(drafts.shape[1].bit_length()):
        visited, above = visited & visited.gather(1, above), above.gather(1, above)
    return visited


def _emit(drawn: Draws, visited: Tensor, depth: Tensor, parent: Tensor, drafts: Tensor, vocab: int) -> AcceptedPath:
    """The visited nodes in order of depth, which has each of 0 … num_accepted once."""
    node = torch.arange(depth.shape[1], device=depth.device).expand_as(depth)
    place = depth.where(visited, depth.shape[1])  # those not visited go to a column that is cut off

    def along(values: Tensor, fill: float) -> Tensor:
        padded = values.new_full((values.shape[0], values.shape[1] + 1), fill)
        return padded.scatter(1, place, values)[:, :-1]

    lse = drawn.logsumexp
    bits = 1 * lse.isnan() + 2 * lse.isposinf() + 4 * lse.isneginf()
    child = (drafts < -1) | (drafts >= vocab)
    bad = 8 * (child & visited.gather(1, parent[:, 1:])).any(-1)
    status = sum((bit * ((bits == bit) & visited).any(-1) for bit in (1, 2, 4)), start=bad)
    return AcceptedPath(
        along(drawn.tokens, -1), visited.sum(-1) - 1, along(drawn.logprob, 0.0), status, along(node, -1)
    )
