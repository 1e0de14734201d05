"""How much a row matters: leverage scores, Lewis weights, ℓp sensitivities."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import keys
from . import _checks
from .dense import Gaussian
from .sparse import SJLT


def leverage_scores(
    a: Tensor,
    *,
    ridge: float = 0.0,
    method: str = "exact",
    size: int | None = None,
    probes: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """lᵢ = aᵢᵀ (AᵀA + ridge·I)⁺ aᵢ for the rows of a (m, n) -> (m,), in [0, 1]; their sum is the (effective) rank.

    "exact" factors A: O(m n²). "sketched" factors an SJLT of A with `size` rows (8 nonzeros a column), which costs one
    read, and then takes the norms of the rows of A R⁻¹; with `probes` these norms are estimated by as many Gaussian
    vectors, O(m n probes). With size = 8n the scores are off by a factor in about [0.7, 1.8], and 12 probes add a
    relative deviation of 0.4.

    Args:
        a: (m, n), any floating dtype; finite.
        ridge: λ ≥ 0, in units of the squared data.
        method: "exact" or "sketched".
        size: rows of the sketch, in [n, m]; 8n, at most m, by default.
        probes: Gaussian vectors; None: the norms themselves.
        key, generator: of "sketched".

    Drineas, Magdon-Ismail, Mahoney, Woodruff, "Fast approximation of matrix coherence and statistical leverage",
    JMLR 2012.

    >>> a = torch.randn(100, 5)
    >>> torch.allclose(leverage_scores(a).sum(), torch.tensor(5.0))
    True
    """
    op = "leverage_scores"
    x = _checks.matrix(op, "a", a)
    ridge = _checks.number(op, "ridge", ridge, 0.0)
    _checks.choice(op, "method", method, ("exact", "sketched"))
    if method == "exact":
        if size is not None or probes is not None or key is not None or generator is not None:
            raise ValueError(f"{op}: size, probes, key and generator must be None when method is 'exact'")
        q, r = torch.linalg.qr(x)
        u, s, _ = torch.linalg.svd(r, full_matrices=False)
        return (q @ u * (s * _inverse(s, ridge, x.shape))).square().sum(1).clamp(max=1)
    (m, n), key = x.shape, _checks.key_for(op, key, generator, x.device)
    if n > m:
        raise ValueError(f"{op}: a must have at least as many rows as columns to be sketched, got {tuple(x.shape)}")
    size = min(8 * n, m) if size is None else _checks.whole(op, "size", size, n, m)
    _, s, vt = torch.linalg.svd(SJLT(size, m, nnz=min(8, size), key=keys.fold_in(key, 0)) @ x, full_matrices=False)
    whitening = vt.T * _inverse(s, ridge, x.shape)
    if probes is not None:
        probes = _checks.whole(op, "probes", probes, 1, 2**31 - 1)
        whitening = whitening @ Gaussian(probes, n, key=keys.fold_in(key, 1)).T
    return (x @ whitening).square().sum(1).clamp(max=1)


def _inverse(s: Tensor, ridge: float, shape: torch.Size) -> Tensor:
    """1/√(s² + ridge), 0 beyond the numerical rank."""
    real = s > s.max() * max(shape) * torch.finfo(s.dtype).eps
    return torch.where(real, (s.square() + ridge).rsqrt(), 0.0)


def lewis_weights(a: Tensor, p: float, *, iterations: int = 60) -> Tensor:
    """ℓp Lewis weights of the rows of a (m, n) -> (m,): wᵢ is the leverage score of row i of W^(1/2 − 1/p) A.

    Their sum is the rank; for p = 2 they are the leverage scores. The fixed point is approached by
    log w <- (1 − t) log w + t log l(w), t = min(1, p/2), whose derivative lies in [0, |1 − 2/p|] or [0, 1 − p/2].

    Cohen, Peng, "ℓp row sampling by Lewis weights", STOC 2015.

    >>> round(float(lewis_weights(torch.randn(50, 3), 1.0).sum()), 3)
    3.0
    """
    x = _checks.matrix("lewis_weights", "a", a)
    p = _checks.number("lewis_weights", "p", p, 0.0)
    if p == 0 or p == float("inf"):
        raise ValueError(f"lewis_weights: p must be positive and finite, got {p}")
    t = min(1.0, p / 2)
    w = leverage_scores(x)
    nonzero = w > 0
    for _ in range(_checks.whole("lewis_weights", "iterations", iterations, 1, 10**6) if p != 2 else 0):
        scale = torch.where(nonzero, w, 1.0).pow(0.5 - 1 / p)
        w = torch.where(nonzero, w.pow(1 - t) * leverage_scores(x * scale.unsqueeze(1)).pow(t), 0.0)
    return w


def lp_sensitivities(a: Tensor, p: float = 2.0, *, method: str = "bound", iterations: int = 100) -> Tensor:
    """σᵢ = max over x of |⟨aᵢ, x⟩|^p / ‖Ax‖ₚ^p for the rows of a (m, n) -> (m,), in [0, 1]; p ≥ 1.

    "bound" gives what sampling needs, a number that is not below: the Lewis weights w for p ≤ 2, n^(p/2 − 1) w beyond.
    "exact" solves m convex problems by reweighted least squares with `iterations` steps, from below, in O(m² n²) a
    step. For p = 2 both are the leverage scores.
    To sample: keep row i with probability qᵢ = min(1, α σᵢ) (`sample_rows`), scaled by qᵢ^(−1/p).

    Woodruff, Yasuda, "Sharper bounds for ℓp sensitivity sampling", ICML 2023.

    >>> a = torch.randn(40, 3, dtype=torch.float64)
    >>> bool((lp_sensitivities(a, 1.0) >= lp_sensitivities(a, 1.0, method="exact")).all())
    True
    """
    op = "lp_sensitivities"
    x = _checks.matrix(op, "a", a)
    p = _checks.number(op, "p", p, 1.0, 1e3)
    _checks.choice(op, "method", method, ("bound", "exact"))
    if p == 2:
        return leverage_scores(x)
    if method == "bound":
        w = lewis_weights(x, p)
        return (w * x.shape[1] ** max(p / 2 - 1, 0.0)).clamp(max=1)
    u, s, _ = torch.linalg.svd(x.double(), full_matrices=False)  # sensitivities are those of any basis of the range
    u = u[:, s > s.max() * max(x.shape) * torch.finfo(x.dtype).eps]
    iterations = _checks.whole(op, "iterations", iterations, 1, 10**6)
    block = max(1, 2**24 // x.shape[0])
    return torch.cat([_sensitivities(u, rows, p, iterations) for rows in u.split(block)]).to(x.dtype)


def _sensitivities(a: Tensor, rows: Tensor, p: float, iterations: int) -> Tensor:
    """1 / min ‖Ax‖ₚ^p subject to ⟨r, x⟩ = 1 for each of `rows` (b, n); a (m, n) with orthonormal columns.

    Newton's method on Σ|t|^p, t = Ax: a weighted least-squares problem with weights |t|^(p−2), of whose step 1/(p − 1)
    is taken for p > 2. Steps that do not descend are halved. Weights are bounded: (t² + ε max t²)^(p/2 − 1), ε -> 0.
    """
    n = a.shape[1]
    outer = (a.unsqueeze(2) * a.unsqueeze(1)).flatten(1)  # (m, n²): the Gram matrix of weights w is w @ outer
    squared = rows.square().sum(1, keepdim=True)
    x = torch.where(squared > 0, rows / squared.clamp(min=1e-300), 0.0)
    cost = (x @ a.T).abs().pow(p).sum(1, keepdim=True)
    for step in range(iterations):
        t2 = (x @ a.T).square()
        smooth = 10.0 ** (-3 - 9 * step / iterations)
        weight = (t2 + smooth * t2.amax(1, keepdim=True).clamp(min=1e-300)).pow(p / 2 - 1)
        weight = weight / weight.amax(1, keepdim=True)
        gram = (weight @ outer).unflatten(1, (n, n))
        gram = gram + 1e-14 * gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(n, device=a.device)
        y = torch.linalg.solve(gram, rows.unsqueeze(2)).squeeze(2)
        scale = (y * rows).sum(1, keepdim=True)
        direction = torch.where(scale > 0, y / scale.clamp(min=1e-300), x) - x
        for halving in range(4):
            tried = x + direction * (0.5**halving / max(p - 1, 1.0))
            value = (tried @ a.T).abs().pow(p).sum(1, keepdim=True)
            better = value < cost
            x, cost = torch.where(better, tried, x), torch.where(better, value, cost)
            direction = torch.where(better, 0.0, direction)
    return torch.where(squared > 0, 1 / cost.clamp(min=1e-300), 0.0).squeeze(1).clamp(max=1)
