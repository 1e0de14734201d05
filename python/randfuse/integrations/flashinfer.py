"""FlashInfer's samplers by name and signature, for any device and float type, exact in the tail.

    from randfuse.integrations import flashinfer as sampling       # instead of flashinfer.sampling

Float32 copies of bfloat16 logits are not needed, and a NaN takes part in no draw instead of an illegal access.
Whoever has logits spares the softmax and its logarithm with `categorical_sample` and `speculative_accept`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _sampling
from ..keys import fold_in, resolve
from ..keys import key as make_key
from ..ops import categorical_sample_with_stats, speculative_accept
from ..reference import streams


def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """A token of softmax(logits) for each row, or for row indices[i] for each i.

    int32, or the dtype of indices. `seed` and `offset` are numbers or tensors (1,) or (batch,), together one key.
    Results are always deterministic.
    """
    return _sample(logits, indices, generator, check_nan, seed, offset)[0]


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same from probabilities of any sum; with `return_valid` also which rows had a law to draw from."""
    tokens, valid = _sample(probs.log(), indices, generator, check_nan, seed, offset)
    return (tokens, valid) if return_valid else tokens


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which drafts stand, and the token after them: `speculative_accept` from probabilities.

    Args:
        draft_probs, draft_token_ids, target_probs: (B, K, V), integers (B, K) and (B, K+1, V); the id −1 ends a
            request's drafts, which FlashInfer counts as emitted. Rows need not sum to 1.
        maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num: int32 (B,), **added to** in place: drafts
            that would stand each by itself (tokens beyond the stop included), and drafts that do stand.
        seed, offset: as in `sampling_from_logits`; a step needs an offset of its own.

    Returns:
        int32 (B, K+1) tokens, padded with −1, and the two counts.
    """
    op = "chain_speculative_sampling"
    ids, device = draft_token_ids.to(torch.int64), target_probs.device
    key = resolve(_key(seed, offset, device), generator, device)
    accepted = speculative_accept(target_probs.log(), ids, draft_probs.log(), key=key)
    b, k = ids.shape
    counts = []
    for name, given in (
        ("maybe_output_accepted_token_num", maybe_output_accepted_token_num),
        ("maybe_output_emitted_draft_token_num", maybe_output_emitted_draft_token_num),
    ):
        count = torch.zeros(b, dtype=torch.int32, device=device) if given is None else given
        _sampling.integers(op, name, count, torch.int32, device)
        _checks.shape(op, name, count, (b,), "(B,)")
        counts.append(count)
    q, p = (
        (rows.gather(-1, ids.clamp(min=0).unsqueeze(-1)) / rows.sum(-1, keepdim=True)).squeeze(-1)
        for rows in (draft_probs, target_probs[:, :k])
    )
    emitted = accepted.num_accepted
    drafts = (ids >= 0).cumprod(-1) > 0
    beyond = drafts & (torch.arange(k, device=device) > emitted.unsqueeze(-1))
    counts[0] += emitted + (beyond & (_coins(key, b, k) * q < p)).sum(-1)
    counts[1] += emitted
    return accepted.tokens.to(torch.int32), counts[0], counts[1]


def _coins(key: Tensor, b: int, k: int) -> Tensor:
    """(b, k) accept coins, those that `speculative_accept` throws."""
    of_request, rows = streams.row_keys(key, b)
    drawn = [streams.block(of_request, rows, j, op=streams.ACCEPT_COIN, width=32, sample=0)[:2] for j in range(k)]
    coins = [((high << 21) | (low >> 11)).double() * 2.0**-53 for low, high in drawn]
    return torch.stack(coins, -1) if coins else torch.empty(b, 0, dtype=torch.float64, device=key.device)


def _sample(
    logits: Tensor,
    indices: Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    if check_nan and bool(logits.isnan().any()):
        raise ValueError("sampling_from_logits: logits must be free of NaN")
    # Two draws of one row are draws of their own, so rows are gathered: `rows=` would give both the same token.
    x = logits if indices is None else logits[indices]
    key = _key(seed, offset, x.device)
    facts = categorical_sample_with_stats(x, key=key, generator=generator if seed is None else None)
    return facts.tokens.to(torch.int32 if indices is None else indices.dtype), facts.logsumexp.isfinite()


def _key(seed: int | Tensor | None, offset: int | Tensor | None, device: torch.device) -> Tensor | None:
    if seed is None:
        return None
    key = fold_in(_word(seed, device), _word(0 if offset is None else offset, device))
    return key.reshape(()) if key.numel() == 1 else key


def _word(value: int | Tensor, device: torch.device) -> Tensor:
    """A number or a uint64 or int64 tensor as int64 of the same bits."""
    if not isinstance(value, Tensor):
        return make_key(value, device)
    if value.dtype not in (torch.int64, torch.uint64) or value.dim() > 1:
        raise TypeError(f"sampling: seed and offset must be int64 or uint64 (1,) or (batch,), got {value.dtype}")
    return value.to(device).view(torch.int64)
