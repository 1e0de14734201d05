"""Projections onto the row space of A (W ⊗ I) or A (W^½ ⊗ W^½) while W changes, as interior-point methods need them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import keys
from . import _checks
from .operator import sketch_many
from .sparse import SJLT

FORMS = ("one-sided", "two-sided")


class KroneckerProjection:
    """P = Bᵀ(BBᵀ)⁻¹B for m constraints Aᵢ (n, n) and a symmetric W (n, n) that changes.

    Row i of B is W Aᵢ in the "one-sided" form, B = A (W ⊗ I), and W^½ Aᵢ W^½ in the "two-sided" one,
    B = A (W^½ ⊗ W^½), whose Gram matrix tr(Aᵢᵀ W Aⱼ W) is that of a Newton step of semidefinite programming.

    `update` adds a matrix of rank k to W and corrects (BBᵀ)⁻¹ by Woodbury's formula, O(m² nk) instead of O(m² n² + m³).
    `project` applies P, O(m n²). `query` estimates P h without bias from L kept products Pₗ = P Rₗᵀ with independent
    sketches Rₗ of `size` rows, O(L n² size): the median over l of Pₗ (Rₗ h), by coordinates. Each answer is off by
    about ‖Pⱼ‖‖h‖√(2 / size) in coordinate j; because the randomness is used again, an adversary who sees T
    answers can break it unless L is of the order √T.

    Args:
        A: (m, n, n), m ≤ n², linearly independent.
        W: (n, n), symmetric and invertible; positive definite in the two-sided form.
        form: "one-sided" or "two-sided".
        sketches: L, odd; 0 for none.
        size: rows of each sketch, at most n².
        key, generator: see `randfuse.key`.

    Song, Yang, Yang, Zhou, "Dynamic Kronecker projection maintenance", 2022 (arXiv 2210.11542).

    >>> projection = KroneckerProjection(torch.randn(7, 5, 5), torch.eye(5))
    >>> h = torch.randn(5, 5)
    >>> once = projection.project(h)
    >>> torch.allclose(projection.project(once), once, atol=1e-4)
    True
    """

    _kept: Tensor | None  # the products with the sketches, once they are asked for

    def __init__(
        self,
        A: Tensor,
        W: Tensor,
        *,
        form: str = "one-sided",
        sketches: int = 0,
        size: int = 1,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        op = "KroneckerProjection"
        w = _checks.matrix(op, "W", W)
        n = len(w)
        if w.shape != (n, n) or not torch.allclose(w, w.T):
            raise ValueError(f"{op}: W must be symmetric, got {tuple(W.shape)}")
        _checks.float_tensor(op, "A", A)
        if A.dim() != 3 or A.shape[1:] != (n, n) or not 1 <= len(A) <= n * n:
            raise ValueError(f"{op}: A must have shape (m, {n}, {n}) with m in [1, {n * n}], got {tuple(A.shape)}")
        if A.dtype != W.dtype or A.device != W.device:
            raise ValueError(f"{op}: A must be {W.dtype} on {W.device}, got {A.dtype} on {A.device}")
        self.A = _checks.finite(op, "A", A).to(w.dtype)
        _checks.choice(op, "form", form, FORMS)
        if _checks.whole(op, "sketches", sketches, 0, 2**16) and sketches % 2 == 0:
            raise ValueError(f"{op}: sketches must be odd, for a median, or 0, got {sketches}")
        _checks.whole(op, "size", size, 1, n * n)
        key = _checks.key_for(op, key, generator, A.device)
        self.form = form
        self._sketches = [
            SJLT(size, n * n, nnz=min(8, size), key=keys.fold_in(key, sketch)) for sketch in range(sketches)
        ]
        self._take(op, w)

    def _take(self, op: str, w: Tensor, inverse: Tensor | None = None) -> None:
        """W, B and the inverse of its Gram matrix, from nothing unless it is given: all of them or, raising, none."""
        if self.form == "one-sided":
            b = (w @ self.A).flatten(1)
        else:
            values, vectors = torch.linalg.eigh(w)
            if values[0] <= 0:
                raise ValueError(f"{op}: W must be positive definite, got an eigenvalue of {float(values[0]):.3g}")
            root = vectors * values.sqrt() @ vectors.T
            b = (root @ self.A @ root).flatten(1)
        if inverse is None:
            factor, failed = torch.linalg.cholesky_ex(b @ b.T)
            if failed:
                raise ValueError(f"{op}: A must be linearly independent and W invertible, got neither or one")
            inverse = torch.cholesky_inverse(factor)
        self.W, self._b, self._inverse, self._kept = w, b, inverse, None

    def update(self, u: Tensor, c: Tensor) -> None:
        """W <- W + u diag(c) uᵀ for u (n, k), c (k,); where it raises, nothing has changed."""
        op = "KroneckerProjection.update"
        u, a = _checks.matrix(op, "u", u, rows=len(self.W)).to(self.W.dtype), self.A
        k, n, m = u.shape[1], len(self.W), len(a)
        if c.shape != (k,) or not c.isfinite().all():
            raise ValueError(f"{op}: c must be finite with shape ({k},), got {tuple(c.shape)}")
        diagonal = torch.diag(c.to(u.dtype))
        w = self.W + u @ diagonal @ u.T
        if 2 * n * k >= m:  # the correction would be no smaller than the matrix
            return self._take(op, w)
        # Gram matrix (i, j) <- itself + ⟨leftᵢ, rⱼ⟩, r (m, 2k, n) and left linear in r: not by D⁻¹, since c may be 0.
        if self.form == "one-sided":  # W'² = W² + f D fᵀ with f = [Wu, u], D = [[0, C], [C, C uᵀu C]]
            r = torch.cat((self.W @ u, u), 1).T @ a
            corner = torch.cat((torch.zeros_like(diagonal), diagonal), 1)
            left = torch.cat((corner, torch.cat((diagonal, diagonal @ (u.T @ u) @ diagonal), 1))) @ r
        else:  # tr(AᵢᵀW'AⱼW') = tr(AᵢᵀWAⱼW) + ⟨C uᵀAᵢW', uᵀAⱼ⟩ + ⟨C uᵀAᵢᵀW, uᵀAⱼᵀ⟩
            one, two = u.T @ a, u.T @ a.mT
            r, left = torch.cat((one, two), 1), torch.cat((diagonal @ one @ w, diagonal @ two @ self.W), 1)
        r, left = r.flatten(1), left.flatten(1)
        inner = torch.eye(2 * k * n, dtype=r.dtype, device=r.device) + r.T @ self._inverse @ left
        correction = self._inverse @ left @ torch.linalg.solve(inner, r.T @ self._inverse)
        self._take(op, w, self._inverse - (correction + correction.T) / 2)

    def project(self, h: Tensor) -> Tensor:
        """P h for h (…, n, n)."""
        flat = self._flat("project", h)
        return (flat @ self._b.T @ self._inverse @ self._b).view(h.shape)

    def query(self, h: Tensor) -> Tensor:
        """An estimate of P h for h (n, n) from the sketches."""
        if not self._sketches:
            raise ValueError("KroneckerProjection.query: sketches must be at least 1, got 0")
        flat = self._flat("query", h)
        if self._kept is None:
            self._kept = self._b.T @ (self._inverse @ sketch_many(self._sketches, self._b, 1))  # (L, n², size)
        answers = self._kept @ sketch_many(self._sketches, flat.T)  # (L, n², …)
        return answers.median(0).values.T.reshape(h.shape)

    def _flat(self, name: str, h: Tensor) -> Tensor:
        op, n = f"KroneckerProjection.{name}", len(self.W)
        if h.dim() < 2 or h.shape[-2:] != (n, n) or h.dtype != self.W.dtype or h.device != self.W.device:
            raise ValueError(
                f"{op}: h must be {self.W.dtype} (…, {n}, {n}) on {self.W.device}, got {h.dtype} {tuple(h.shape)} on "
                f"{h.device}"
            )
        return _checks.finite(op, "h", h).reshape(-1, n * n)
