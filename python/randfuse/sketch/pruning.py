"""Pruning at initialisation as sketching: a random mask that keeps what a layer computes in the mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from .sampling import sample_rows


class PruningMask(NamedTuple):
    mask: Tensor  # bool, of the weight's shape
    factor: Tensor  # 1/p where kept, else 0: weight * factor has the mean weight


def prune_at_init_mask(
    weight: Tensor,
    density: float,
    *,
    activations: Tensor | None = None,
    method: str = "pivotal",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> PruningMask:
    """Keep a share `density` of a weight (N, K), entry (i, j) with probability min(1, c·|wᵢⱼ|·‖X_j‖).

    These probabilities minimise E‖X w̃ᵀ − X wᵀ‖² among independent ones, w̃ = weight · factor; without
    activations X (…, K) they go by magnitude. The largest scores alone would be a biased mask.

    Args:
        weight: the layer's, any shape whose last dimension is the input's.
        density: in (0, 1]; round(density · size) entries stay, all of them non-zero.
        activations: inputs of the layer, data or noise.
        method: as in `sample_rows`.
        key, generator: see `randfuse.key`.

    Qian, Wang, Zhang et al., "Pruning at initialization: a sketching perspective", 2023 (arXiv 2305.17559).

    >>> weight = torch.randn(20, 30)
    >>> mask, factor = prune_at_init_mask(weight, 0.1, key=randfuse.key(0))
    >>> int(mask.sum()), torch.equal(mask, factor > 0)
    (60, True)
    """
    op = "prune_at_init_mask"
    _checks.float_tensor(op, "weight", weight)
    density = _checks.number(op, "density", density, 1e-12, 1.0)
    score = _checks.finite(op, "weight", weight).detach().double().abs()
    if activations is not None:
        if activations.shape[-1:] != weight.shape[-1:]:
            raise ValueError(f"{op}: activations must have {weight.shape[-1]} columns, got {tuple(activations.shape)}")
        score = score * _checks.finite(op, "activations", activations).detach().double().flatten(0, -2).norm(dim=0)
    k = max(1, round(density * weight.numel()))
    sample = sample_rows(score.flatten(), k, method=method, key=key, generator=generator)
    factor = torch.zeros_like(score).flatten().index_copy(0, sample.indices, 1 / sample.probabilities)
    factor = factor.view(weight.shape)
    return PruningMask(factor > 0, factor.to(weight.dtype))
