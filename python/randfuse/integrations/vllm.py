"""vLLM's rejection samplers by signature, for any device: the current model runner's and V1's.

    from randfuse.integrations.vllm import rejection_sample        # vllm.v1.worker.gpu.spec_decode
    from randfuse.integrations.vllm import rejection_sample_v1     # vllm.v1.sample.rejection_sampler

Logits are the processed ones of both: filtered, and divided by the temperature already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..keys import draw_key, fold_in
from ..ops import speculative_accept


def rejection_sample(
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_sampled: Tensor,
    cu_num_logits: Tensor,
    pos: Tensor,
    idx_mapping: Tensor,
    expanded_idx_mapping: Tensor,
    expanded_local_pos: Tensor,
    temperature: Tensor,
    seed: Tensor,
    num_speculative_steps: int,
    synthetic_conditional_rates: Tensor | None = None,
    use_fp64: bool = False,
    use_block_verification: bool = False,
) -> tuple[Tensor, Tensor]:
    """`speculative_accept` on a packed batch whose requests own slots of the engine's state.

    Request b has the key seed[slot] and the position of its first row, so that a step needs no state. vLLM's drafters
    have noise of their own; draft j drawn by our samplers has the key ``fold_in(fold_in(seed, position), j)``, never
    that of its place in the text: block verification has looked at drafts beyond its stop.

    Args:
        target_logits: (rows, V), rows cu_num_logits[b] … cu_num_logits[b+1]−1 for request b.
        draft_logits: (slots, K, V_draft), tempered; None: one-hot. Requests' rows are copied together. The smaller of
            the vocabularies counts: what is beyond it is padding.
        draft_sampled: integers (rows,), input token of each row: draft j is that of row j + 1.
        cu_num_logits, pos, idx_mapping: integers (B+1,), (rows,) and (B,): a request's rows, a row's place in the text,
            a request's slot.
        expanded_idx_mapping, expanded_local_pos: not read; they repeat the above for each row.
        temperature, seed: (slots,); temperature only tells which requests are greedy (0).
        num_speculative_steps: K.
        synthetic_conditional_rates: must be None: rates that are made up change the law of the text.
        use_fp64: not read; draws are exact in the tail anyway.
        use_block_verification: mode "block".

    Returns:
        int64 (B, K+1), padded with −1, and int32 (B,), how many tokens each request got.
    """
    if synthetic_conditional_rates is not None:
        raise NotImplementedError("rejection_sample: synthetic_conditional_rates must be None, got a Tensor")
    slots, cu = idx_mapping.to(torch.int64), cu_num_logits.to(torch.int64)
    vocab = target_logits.shape[-1]
    if draft_logits is not None:
        vocab = min(vocab, draft_logits.shape[-1])
        draft_logits = draft_logits[slots, :, :vocab]
    last = max(draft_sampled.shape[0] - 1, 0)
    first = cu[:-1].clamp(max=last)  # a request without rows may begin after the last
    drafts = (first.unsqueeze(-1) + torch.arange(1, num_speculative_steps + 1, device=cu.device)).clamp(max=last)
    accepted = speculative_accept(
        target_logits[:, :vocab],
        draft_sampled.to(torch.int64)[drafts],
        draft_logits,
        cu_num_logits=cu,
        temperature=(temperature[slots] != 0).float(),
        mode="block" if use_block_verification else "token",
        positions=pos.to(torch.int64)[first],
        key=seed[slots],
    )
    return accepted.tokens, (accepted.tokens >= 0).sum(-1, dtype=torch.int32)


def rejection_sample_v1(
    draft_token_ids: Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    bonus_token_ids: Tensor,
    sampling_metadata: Any,
) -> Tensor:
    """V1's `rejection_sample`, which gets no row for the token after the last draft but that token itself.

    Each draft is a request of one to `speculative_accept`, whose verdicts are cut at the first that falls: no row is
    copied, as a batch with rows for the bonus would ask for, and none is skipped.

    Args:
        draft_token_ids, draft_probs, target_logits: (N,), (N, V) or None for one-hot, (N, V): all drafts of all
            requests; probabilities and logits of one dtype.
        num_draft_tokens, max_spec_len, cu_num_draft_tokens: drafts of each request, the most, and (B,) their sums.
        bonus_token_ids: (B, 1).
        sampling_metadata: has temperature (0: greedy), all_greedy, all_random and generators {request: generator}.

    Returns:
        int32 (B, max_spec_len + 1), padded with −1.
    """
    n, b, device = draft_token_ids.shape[0], len(num_draft_tokens), target_logits.device
    meta, requests = sampling_metadata, torch.arange(b, device=device)
    ends = cu_num_draft_tokens.to(torch.int64)
    counts = ends.diff(prepend=ends.new_zeros(1))
    request = requests.repeat_interleave(counts, output_size=n)
    place = torch.arange(n, device=device) - (ends - counts)[request]

    keys = fold_in(draw_key(device), requests)
    for index, generator in meta.generators.items():
        keys[index] = draw_key(device, generator)
    random = not meta.all_greedy
    some_greedy = random and not meta.all_random
    verdict = speculative_accept(
        target_logits.unsqueeze(1).expand(n, 2, -1),  # the second row would be the bonus's: its draw is not used
        draft_token_ids.to(torch.int64).unsqueeze(1),
        None if draft_probs is None else draft_probs.log().unsqueeze(1),
        temperature=(meta.temperature != 0).float()[request] if some_greedy else float(random),
        key=fold_in(keys[request], place) if n else None,
    )
    shape = b, max_spec_len + 1
    tokens = torch.zeros(shape, dtype=torch.int32, device=device)
    tokens[request, place] = verdict.tokens[:, 0].int()
    tokens[requests, counts] = bonus_token_ids.squeeze(-1).int()
    ending = torch.zeros(shape, dtype=torch.bool, device=device)
    ending[request, place] = verdict.num_accepted == 0
    ending[requests, counts] = True
    stop = ending.int().argmax(-1, keepdim=True)  # the first of equals
    return tokens.where(torch.arange(shape[1], device=device) <= stop, -1)
