"""SGLang's verification of a tree of drafts by name and signature, for any device, exact also where siblings repeat.

from randfuse.integrations.sglang import tree_speculative_sampling_target_only   # instead of sgl_kernel's
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..keys import fold_in
from ..ops import speculative_accept_tree


def tree_speculative_sampling_target_only(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """`speculative_accept_tree` on first-child and next-sibling links; node 0 is the last token of the text.

    The coins' bits are the key, so a result depends on what SGLang's depends on, but is another draw of the same law.

    Args:
        predicts: int32, written at the slot of each node on the path: the token drawn there.
        accept_index: int32 (B, S), written: slots of the path from node 0, at most S − 1 drafts; the rest is kept.
        accept_token_num: int32 (B,), written: how many drafts stand.
        candidates: integers (B, N), the token of each node.
        retrive_index: integers (B, N), the slot of each node in predicts.
        retrive_next_token, retrive_next_sibling: integers (B, N), first child and next sibling, −1 for none. A parent
            comes before its children.
        uniform_samples, uniform_samples_for_final_sampling: float32 (B, N) and (B,).
        target_probs: (B, N, V), tempered and filtered.
        draft_probs: not read: the target's own draw decides. Nor is it written, which SGLang does.
        threshold_single, threshold_acc: must be 1; others change the law of the text.
    """
    op = "tree_speculative_sampling_target_only"
    if threshold_single != 1 or threshold_acc != 1:
        raise ValueError(f"{op}: thresholds must be 1, got {threshold_single} and {threshold_acc}")
    b, n = candidates.shape
    for name, coins, shape, letters in (
        ("uniform_samples", uniform_samples, (b, n), "(B, N)"),
        ("uniform_samples_for_final_sampling", uniform_samples_for_final_sampling, (b,), "(B,)"),
    ):
        if coins.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {coins.dtype}")
        _checks.shape(op, name, coins, shape, letters)
    parents, linked = _parents(retrive_next_token.to(torch.int64), retrive_next_sibling.to(torch.int64))
    words, last = (
        c.contiguous().view(torch.int32).to(torch.int64) for c in (uniform_samples, uniform_samples_for_final_sampling)
    )
    key = fold_in(fold_in(words, torch.arange(n, device=words.device)).sum(-1), last)
    ids = candidates.to(torch.int64)[:, 1:].where(linked, -1)
    path = speculative_accept_tree(target_probs.log(), ids, parents, key=key)

    steps = min(accept_index.shape[1], n)  # a longer path ends with the draw at its last node, as any path does
    nodes, tokens = path.node_ids[:, :steps], path.tokens[:, :steps]
    slots = retrive_index.to(torch.int64).gather(1, nodes.clamp(min=0))
    accept_index[:, :steps] = slots.to(accept_index.dtype).where(nodes >= 0, accept_index[:, :steps])
    accept_token_num.copy_(path.num_accepted.clamp(max=steps - 1))
    # A slot more takes the writes of padding; masks as indices would wait for the device.
    spare = torch.nn.functional.pad(predicts, (0, 1))
    places = slots.where(nodes >= 0, predicts.shape[0])
    predicts.copy_(spare.index_put((places,), tokens.to(predicts.dtype))[:-1])


def _parents(child: Tensor, sibling: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N−1) parent of nodes 1 …, and whether there is one; links are turned round, then followed by doubling."""
    b, n = child.shape
    node = torch.arange(n, device=child.device).expand(b, n)

    def inverse(links: Tensor) -> Tensor:
        return node.new_full((b, n + 1), -1).scatter(1, links.where(links >= 0, n), node)[:, :n]

    parent, left = inverse(child), inverse(sibling)
    eldest = left.where(left >= 0, node)
    for _ in range(n.bit_length()):
        eldest = eldest.gather(1, eldest)
    parent = parent.gather(1, eldest)[:, 1:]
    return parent.clamp(min=0), parent >= 0
