"""The integers around the draws at the nodes of a tree: csrc/kernels/cpu/speculative_accept_tree.h, in two launches.

    tree_keys_kernel    a program BLOCK nodes of a request; each climbs to the root for its depth, one load a level
    accept_path_kernel  a program a request walks down: a node's draw, then the first child that holds it among all
                        drafts, BLOCK at a time

A hundred nodes are a few KB, which the caches hold: latencies count, not bytes. A level costs two dependent reads, a
walk of ten an estimated 5 us, where the same in torch is some 70 launches. Parents are read where they lie and cannot
be refused: one that does not come before its child counts as the root, so every climb and every walk ends.
"""

import torch
import triton
import triton.language as tl
from randfuse import _checks, _sampling
from randfuse.reference.speculative_accept import BAD_ID, NAN, NO_SUPPORT, POS_INF

from . import launch, philox
from .logit_tiles import INF

BAD_ID, NAN, NO_SUPPORT, POS_INF = (tl.constexpr(bit) for bit in (BAD_ID, NAN, NO_SUPPORT, POS_INF))
BLOCK = tl.constexpr(128)


@triton.jit
def parent_of(parent_ptr, draft, wanted):
    """Node above a draft."""
    up = tl.load(parent_ptr + draft, mask=wanted, other=0)
    return tl.where((up >= 0) & (up <= draft), up, 0)


@triton.jit
def tree_keys_kernel(key_ptr, position_ptr, parent_ptr, N: tl.int64, blocks, out_ptr, SHARED: tl.constexpr):
    b = tl.program_id(0).to(tl.int64) // blocks
    node = tl.program_id(0).to(tl.int64) % blocks * BLOCK + tl.arange(0, BLOCK)
    key = philox.fold_in(tl.load(key_ptr), b) if SHARED else tl.load(key_ptr + b)
    place = tl.zeros([BLOCK], tl.int64)
    if position_ptr is not None:
        place += tl.load(position_ptr + b)
    at = tl.where(node <= N, node, 0)
    while tl.max(at, 0) > 0:
        place += (at > 0).to(tl.int64)
        at = tl.where(at > 0, parent_of(parent_ptr + b * N, at - 1, at > 0), 0)
    tl.store(out_ptr + b * (N + 1) + node, philox.fold_in(key, place), mask=node <= N)


@triton.jit
def accept_path_kernel(
    drawn_ptr, logprob_ptr, lse_ptr, id_ptr, parent_ptr, N: tl.int64, V: tl.int64, token_out_ptr, accepted_ptr,
    logprob_out_ptr, status_ptr, node_out_ptr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row, drafts, index = b * (N + 1), b * N, tl.arange(0, BLOCK)
    node, out, status = tl.zeros([], tl.int64), row, tl.zeros([], tl.int64)
    going = tl.full([], True, tl.int1)
    while going:
        token, lse = tl.load(drawn_ptr + row + node), tl.load(lse_ptr + row + node)
        status |= tl.where(lse != lse, NAN, tl.where(lse == INF, POS_INF, tl.where(lse == -INF, NO_SUPPORT, 0)))
        tl.store(token_out_ptr + out, token)
        tl.store(logprob_out_ptr + out, tl.load(logprob_ptr + row + node))
        tl.store(node_out_ptr + out, node)
        child = N + 1
        for first in range(0, N, BLOCK):
            draft = first + index
            here = (draft < N) & (parent_of(parent_ptr + drafts, draft, draft < N) == node)
            held = tl.load(id_ptr + drafts + draft, mask=here, other=-1)
            wrong = here & ((held < -1) | (held >= V))
            status |= tl.max(tl.where(wrong, BAD_ID, 0), 0).to(tl.int64)
            child = tl.minimum(child, tl.min(tl.where(here & (held == token), draft + 1, N + 1), 0))
        out += 1
        node = child
        going = (child <= N) & (lse != -INF)
    tl.store(accepted_ptr + b, out - row - 1)
    tl.store(status_ptr + b, status)
    for first in range(out, row + N + 1, BLOCK):
        at = first + index
        inside = at <= row + N
        tl.store(token_out_ptr + at, -1, mask=inside)
        tl.store(logprob_out_ptr + at, 0.0, mask=inside)
        tl.store(node_out_ptr + at, -1, mask=inside)


def _integers(op, name, x, shape, letters, device):
    _sampling.integers(op, name, x, torch.int64, device)
    _checks.shape(op, name, x, shape, letters)
    return x.contiguous()


def _parents(op, parents, device):
    if parents.dim() != 2:
        raise ValueError(f"{op}: parents must have shape (B, N), got {tuple(parents.shape)}")
    return _integers(op, "parents", parents, parents.shape, "(B, N)", device)


@launch.op("tree_keys(Tensor key, Tensor? positions, Tensor parents) -> Tensor")
def tree_keys(key, positions, parents):
    op, device = "tree_keys", key.device
    parents = _parents(op, parents, device)
    b, n = parents.shape
    key = _integers(op, "key", key, (b,) if key.dim() else (), "() or (B,)", device)
    if positions is not None:
        positions = _integers(op, "positions", positions, (b,), "(B,)", device)
    out = parents.new_empty(b, n + 1)
    blocks = triton.cdiv(n + 1, BLOCK.value)
    if b:
        tree_keys_kernel[(b * blocks,)](key, positions, parents, n, blocks, out, SHARED=key.dim() == 0, num_warps=1)
    return out


@launch.op(
    "accept_path(Tensor tokens, Tensor logprob, Tensor logsumexp, Tensor draft_token_ids, Tensor parents, SymInt vocab)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def accept_path(tokens, logprob, logsumexp, draft_token_ids, parents, vocab):
    op, device = "accept_path", tokens.device
    parents = _parents(op, parents, device)
    b, n = parents.shape
    ids = _integers(op, "draft_token_ids", draft_token_ids, (b, n), "(B, N)", device)
    drawn = _integers(op, "tokens", tokens, (b, n + 1), "(B, N+1)", device)
    facts = []
    for name, x in (("logprob", logprob), ("logsumexp", logsumexp)):
        _checks.float_tensor(op, name, x, like=logprob)
        _checks.shape(op, name, x, (b, n + 1), "(B, N+1)")
        facts.append(x.contiguous())
    out_tokens, nodes = torch.empty_like(drawn), torch.empty_like(drawn)
    accepted, status = drawn.new_empty(b), drawn.new_empty(b)
    logprobs = torch.empty_like(facts[0])
    if b:
        accept_path_kernel[(b,)](
            drawn, *facts, ids, parents, n, vocab, out_tokens, accepted, logprobs, status, nodes, num_warps=1
        )
    return out_tokens, accepted, logprobs, status, nodes
