"""FlashInfer's samplers by name and signature, for any device and float type, exact in the tail.

    from randfuse.integrations import flashinfer as sampling       # instead of flashinfer.sampling

Float32 copies of bfloat16 logits are not needed, and a NaN takes part in no draw instead of an illegal access.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..keys import fold_in
from ..keys import key as make_key
from ..ops import categorical_sample_with_stats


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
    key = None
    if seed is not None:
        key = _word(seed, x.device)
        key = fold_in(key, _word(0 if offset is None else offset, x.device))
        key = key.reshape(()) if key.numel() == 1 else key
    facts = categorical_sample_with_stats(x, key=key, generator=generator if seed is None else None)
    return facts.tokens.to(torch.int32 if indices is None else indices.dtype), facts.logsumexp.isfinite()


def _word(value: int | Tensor, device: torch.device) -> Tensor:
    """A number or a uint64 or int64 tensor as int64 of the same bits."""
    if not isinstance(value, Tensor):
        return make_key(value, device)
    return value.to(device).view(torch.int64)
