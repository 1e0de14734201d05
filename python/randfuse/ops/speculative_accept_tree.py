"""`speculative_accept_tree`: a tree of drafts, verified by the target's own draw at each node.

The draws are `categorical_sample_with_stats`'s; two small ops stand around them: `tree_keys`, the keys that the nodes
draw with, and `accept_path`, which follows the draws. No CUDA kernels by design: on a GPU Triton's run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks, _sampling, keys
from .._backends import call
from .._registry import rules
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
        parents: int64 (B, N): node below which draft n hangs, in [0, n]: a parent comes before its children. On a GPU,
            where it cannot be checked, one that does not counts as 0.
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
    known = device.type == "cpu" and _sampling.readable(parents)
    if known and not bool(((parents >= 0) & (parents <= torch.arange(n))).all()):
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
    node_keys = call("tree_keys", key, positions, parents)
    draw = partial(
        categorical_sample_with_stats, target_logits, warmth, top_k=filters[0], top_p=filters[1], min_p=filters[2],
        bitmask=bitmask, method="race", key=node_keys.reshape(-1) if b else keys.key(0, device),
    )  # fmt: skip
    if device.type == "cpu" and _sampling.readable(target_logits):
        drawn = _walked(draw, draft_token_ids, parents)
    else:
        facts = draw()
        drawn = Draws(facts.tokens, facts.logprob, facts.logsumexp)
    return AcceptedPath(*call("accept_path", *drawn, draft_token_ids, parents, vocab))


class Draws(NamedTuple):
    """(B, N+1) of each node, of those that nobody looked at 0."""

    tokens: Tensor
    logprob: Tensor
    logsumexp: Tensor


def _walked(draw: Callable[..., CategoricalStats], drafts: Tensor, parents: Tensor) -> Draws:
    """Draws at the nodes of the paths alone, for a host that can see where a path ends."""
    b, nodes = drafts.shape[0], drafts.shape[1] + 1
    parent, ids = pad(parents, (1, 0)), pad(drafts, (1, 0), value=-1)  # the root holds no token
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

    return Draws(*(whole(name) for name in Draws._fields))


def _keys_fake(key: Tensor, positions: Tensor | None, parents: Tensor) -> Tensor:
    return parents.new_empty((parents.shape[0], parents.shape[1] + 1))


def _path_fake(tokens: Tensor, logprob: Tensor, *_: Any) -> tuple[Tensor, ...]:
    whole, per_request = tokens.shape, tokens.shape[:1]
    new = tokens.new_empty
    return new(whole), new(per_request), logprob.new_empty(whole), new(per_request), new(whole)


def _requests(size: int, dim: int | None, x: Tensor) -> Tensor:
    """(B, …) of each batch element -> (batch · B, …)."""
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _keys_vmap(info: Any, in_dims: tuple[Any, ...], key: Tensor, positions: Tensor | None, parents: Tensor) -> Any:
    size = info.batch_size
    b = parents.shape[0] if in_dims[2] is None else parents.movedim(in_dims[2], 0).shape[1]
    key = key.expand(size, *key.shape) if in_dims[0] is None else key.movedim(in_dims[0], 0)
    if key.dim() == 1:  # one a batch element, which serves all its requests
        key = keys.fold_in(key.unsqueeze(-1), torch.arange(b, device=key.device))
    if positions is not None:
        positions = _requests(size, in_dims[1], positions)
    out = call("tree_keys", key.flatten(), positions, _requests(size, in_dims[2], parents))
    return out.unflatten(0, (size, b)), 0


def _path_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size = info.batch_size
    tensors = [_requests(size, dim, x) for dim, x in zip(in_dims[:5], args[:5], strict=True)]
    out = call("accept_path", *tensors, args[5])
    return tuple(x.unflatten(0, (size, len(x) // size)) for x in out), (0,) * len(out)


rules("tree_keys", _keys_fake, vmap=_keys_vmap)
rules("accept_path", _path_fake, vmap=_path_vmap)
