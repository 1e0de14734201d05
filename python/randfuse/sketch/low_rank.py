"""Randomised singular value decomposition with a key."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from .dense import Gaussian


def svd_lowrank(
    A: Tensor,
    q: int = 6,
    niter: int = 2,
    M: Tensor | None = None,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """U (…, m, q), S (…, q), V (…, n, q) with A − M ≈ U diag(S) Vᵀ: `torch.svd_lowrank` with a key, of dense A.

    The range is found from A Ω, Ω a Gaussian sketch of the rows, and `niter` subspace iterations. With
    rank k < q − 1 to be found and no iteration, E‖A − QQᵀA‖² ≤ (1 + k/(q − k − 1)) times the best. torch's function
    draws from the global generator and depends on the device; this one is a function of its arguments.

    Args:
        A: (…, m, n), any floating dtype; float64 computes in float64, everything else in float32.
        q: columns kept, a little more than the rank wanted; at most min(m, n).
        niter: subspace iterations; more for slowly falling singular values.
        M: broadcastable to A, taken off it (a mean).
        key, generator: see `randfuse.key`.

    Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 2011, algorithms 4.4 and 5.1.

    >>> A = torch.randn(50, 3) @ torch.randn(3, 40)
    >>> U, S, V = svd_lowrank(A, 3, key=randfuse.key(0))
    >>> torch.allclose(U * S @ V.mT, A, atol=1e-4)
    True
    """
    op = "svd_lowrank"
    _checks.float_tensor(op, "A", A)
    if A.dim() < 2 or A.layout != torch.strided:
        raise ValueError(f"{op}: A must be dense (…, m, n), got {A.layout} {tuple(A.shape)}")
    a = _checks.finite(op, "A", A).to(torch.float64 if A.dtype == torch.float64 else torch.float32)
    if M is not None:
        _checks.float_tensor(op, "M", M, like=A, dtype=False)
        if torch.broadcast_shapes(M.shape, a.shape) != a.shape:
            raise ValueError(f"{op}: M must broadcast to {tuple(a.shape)}, got {tuple(M.shape)}")
        a = a - _checks.finite(op, "M", M).to(a.dtype)
    q = _checks.whole(op, "q", q, 1, min(a.shape[-2:]))
    niter = _checks.whole(op, "niter", niter, 0, 10**6)
    key = _checks.key_for(op, key, generator, a.device)
    wide = a.shape[-2] < a.shape[-1]
    if wide:
        a = a.mT
    basis = torch.linalg.qr(Gaussian(q, a.shape[-1], key=key).apply(a, -1)).Q
    for _ in range(niter):
        basis = torch.linalg.qr(a @ torch.linalg.qr(a.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ a, full_matrices=False)
    u, v = basis @ u, vh.mT
    return (v, s, u) if wide else (u, s, v)
