"""Reference of the integers around the draws at the nodes of a tree: the keys of the nodes, the path along the draws.

A parent that does not come before its child counts as the root.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import streams
from .speculative_accept import BAD_ID, NAN, NO_SUPPORT, POS_INF


def tree_keys(key: Tensor, positions: Tensor | None, parents: Tensor) -> Tensor:
    """Key () or (B,), parents (B, N) -> (B, N+1): fold_in(the request's key, position + depth) of each node.

    A shared key serves request b as fold_in(key, b).
    """
    b, n = parents.shape
    if key.dim() == 0:
        key = streams.fold_in(key, torch.arange(b, device=key.device))
    above = _parent_of_nodes(parents)
    depth = (torch.arange(n + 1, device=key.device) > 0).long().expand(b, -1)
    for _ in range(n.bit_length()):  # after step k, `above` is 2^k nodes up (the root's is the root)
        depth, above = depth + depth.gather(1, above), above.gather(1, above)
    first = 0 if positions is None else positions.unsqueeze(-1)
    return streams.fold_in(key.unsqueeze(-1), first + depth)


def accept_path(
    tokens: Tensor, logprob: Tensor, logsumexp: Tensor, draft_token_ids: Tensor, parents: Tensor, vocab: int
) -> tuple[Tensor, ...]:
    """Draws (B, N+1) of the nodes and drafts (B, N) -> tokens, num_accepted, logprobs, status, node_ids of the path.

    From a node with support the path goes on to the first of the children that hold its token.
    """
    parent, drafts = _parent_of_nodes(parents), draft_token_ids
    up, n = parent[:, 1:], drafts.shape[1]
    matches = (drafts == tokens.gather(1, up)) & (logsumexp != -torch.inf).gather(1, up)
    twin = (up.unsqueeze(-1) == up.unsqueeze(-2)) & (matches.unsqueeze(-1) & matches.unsqueeze(-2))
    visited, above = pad(matches & ~twin.tril(-1).any(-1), (1, 0), value=True), parent
    for _ in range(n.bit_length()):
        visited, above = visited & visited.gather(1, above), above.gather(1, above)
    node = torch.arange(n + 1, device=drafts.device).expand_as(parent)
    place = torch.where(visited, visited.cumsum(-1) - 1, n + 1)  # children come after parents; n + 1 is cut off

    def along(values: Tensor, fill: float) -> Tensor:
        padded = values.new_full((values.shape[0], n + 2), fill)
        return padded.scatter(1, place, values)[:, :-1]

    bits = NAN * logsumexp.isnan() + POS_INF * logsumexp.isposinf() + NO_SUPPORT * logsumexp.isneginf()
    wrong = (drafts < -1) | (drafts >= vocab)
    status = BAD_ID * (wrong & visited.gather(1, up)).any(-1)
    for bit in (NAN, POS_INF, NO_SUPPORT):
        status = status + bit * ((bits == bit) & visited).any(-1)
    return along(tokens, -1), visited.sum(-1) - 1, along(logprob, 0.0), status, along(node, -1)


def _parent_of_nodes(parents: Tensor) -> Tensor:
    """(B, N+1), the root its own."""
    earlier = (parents >= 0) & (parents <= torch.arange(parents.shape[1], device=parents.device))
    return pad(parents.where(earlier, 0), (1, 0))
