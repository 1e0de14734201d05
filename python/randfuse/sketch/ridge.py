"""Ensembles of ridge regressions on sketched features or rows; generalised cross-validation of the whole λ path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import keys
from . import _checks
from .dense import Gaussian, Rademacher
from .operator import Operator, sketch_many
from .sampling import sample_rows
from .sparse import SJLT, CountSketch
from .trigonometric import SRDCT, SRHT

IID, ORTHOGONAL = (Gaussian, Rademacher, SJLT), (SRHT, SRDCT)


class _Path(NamedTuple):
    """What a fit leaves, for each λ of L."""

    coef: Tensor  # (p, L), the mean over the members
    df: Tensor  # (K, L): trace of the smoothing matrix / n
    error: Tensor  # (L,): ‖y − Xβ‖²/n of the ensemble
    errors: Tensor  # (K, L): of each member


class RidgeEnsemble:
    """The mean of K ridge regressions, each on its own sketch of the features, or on its own subsample of the rows.

    Member k sees X Sₖ, Sₖᵀ an operator of `size` rows: βₖ = Sₖ (SₖᵀXᵀX Sₖ + nλ)⁻¹ SₖᵀXᵀy. Every λ comes from one eigen-
    decomposition a member, and every residual from the one (K size)² Gram matrix of [X S₁ … X S_K], formed in float64.
    With `over="rows"`, member k is fitted to `size` rows drawn without replacement.

    Args:
        size: sketched features q ≤ p, or rows m ≤ n.
        members: K.
        over: "features" or "rows".
        operator: class of the feature sketches; `SJLT` has 8 nonzeros a column here.
        intercept: fit one, on centred data.
        key, generator: see `randfuse.key`.

    Attributes, after `fit`, of each of L penalties:
        lambdas: (L,).
        df: degrees of freedom / n, with the intercept's.
        gcv: estimate of the out-of-sample squared error, consistent for every K, λ and q ("rows": corrected).
        gcv_member, gcv_limit: the same for one member alone and for infinitely many, by the ensemble trick
            R_K = R_∞ + (R_1 − R_∞)/K, which is that of ridge regression with the penalty μ.
        coef, offset: (p, L) and (L,).
        best: index of the least gcv.

    LeJeune, Patil, Javadi, Baraniuk, Tibshirani, "Asymptotics of the sketched pseudoinverse", 2022; Patil, LeJeune,
    "Asymptotically free sketched ridge ensembles", ICLR 2024; Bellec, Du, Koriyama, Patil, Tan, "Corrected generalized
    cross-validation for finite ensembles of penalized estimators", 2023.

    >>> x = torch.randn(200, 50)
    >>> model = RidgeEnsemble(25, 4, key=randfuse.key(0)).fit(x, x[:, 0] + torch.randn(200), [0.1, 1.0])
    >>> model.predict(x).shape, model.gcv.shape, bool((model.gcv_limit <= model.gcv_member).all())
    (torch.Size([200]), torch.Size([2]), True)
    """

    def __init__(
        self,
        size: int,
        members: int = 8,
        *,
        over: str = "features",
        operator: type[Operator] = SJLT,
        intercept: bool = True,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        op = "RidgeEnsemble"
        self.size = _checks.whole(op, "size", size, 1, 2**31 - 1)
        self.members = _checks.whole(op, "members", members, 1, 2**16)
        _checks.choice(op, "over", over, ("features", "rows"))
        if operator not in (*IID, *ORTHOGONAL, CountSketch):
            raise ValueError(f"{op}: operator must be a class of sketches, got {operator}")
        device = key.device if isinstance(key, Tensor) else torch.device("cpu")
        self.over, self.operator, self.intercept = over, operator, intercept
        self.key = _checks.key_for(op, key, generator, device)

    def fit(self, X: Tensor, y: Tensor, lambdas: Tensor | list[float] | None = None) -> RidgeEnsemble:
        """Fit all penalties: X (n, p), y (n,), lambdas (L,) ≥ 0 in units of the features' squares (penalty nλ‖β‖²;
        26 values over five decades around the mean square by default; 0 is the solution of least norm)."""
        op = "RidgeEnsemble"
        x = _checks.matrix(op, "X", X)
        target = _checks.matrix(op, "y", y, rows=len(x), vector=True)
        if y.dim() != 1 or y.device != x.device or x.device != self.key.device:
            raise ValueError(f"{op}: y must be a vector on {x.device}, got {tuple(y.shape)} on {y.device}")
        _checks.whole(op, "size", self.size, 1, x.shape[1] if self.over == "features" else x.shape[0])
        self._mean = x.mean(0), target.double().mean()
        if not self.intercept:
            self._mean = torch.zeros_like(self._mean[0]), torch.zeros_like(self._mean[1])
        x, t = x - self._mean[0], target.squeeze(1).double() - self._mean[1]
        if lambdas is None:
            lambdas = x.double().square().mean() * torch.logspace(-3, 2, 26, dtype=torch.float64, device=x.device)
        grid = torch.as_tensor(lambdas, dtype=torch.float64, device=x.device)
        if grid.dim() != 1 or len(grid) == 0 or not (grid.isfinite() & (grid >= 0)).all():
            raise ValueError(f"{op}: lambdas must be a list of finite numbers of at least 0, got {lambdas}")
        self.lambdas, n, size = grid, len(x), self.size
        path = self._features(x, t) if self.over == "features" else self._rows(x, t)
        df = path.df + self.intercept / n
        self.df = df.mean(0)
        self.gcv = path.error / (1 - self.df).square()
        self.gcv_member = (path.errors / (1 - df).square()).mean(0)
        if self.over == "rows":
            # The residuals of a member mix rows that it has seen with rows that it has not: of an error of 1 they show
            # `left`. The ensemble's gcv is too large in proportion to what the members' errors really are.
            left = (1 - df).square() + (n / size - 1) * df.square()
            risks = (path.errors / left).mean(0)
            self.gcv = self.gcv - (self.df / (1 - self.df)).square() * (n / size - 1) / self.members * risks
            self.gcv_member = risks
        k = self.members
        self.gcv_limit = (k * self.gcv - self.gcv_member) / (k - 1) if k > 1 else torch.full_like(grid, torch.nan)
        self.best = int(self.gcv.nan_to_num(torch.inf).argmin())  # 0/0 where a penalty of 0 interpolates
        self.coef, self.offset = path.coef, self._mean[1] - self._mean[0].double() @ path.coef
        self._residuals = (t.unsqueeze(1) - x.double() @ path.coef) / (1 - self.df)
        return self

    def _features(self, x: Tensor, y: Tensor) -> _Path:
        (n, p), k, size = x.shape, self.members, self.size
        options: dict[str, Any] = {"nnz": min(8, size)} if self.operator is SJLT else {}
        member_keys = keys.split(self.key, k)
        self._operators = [self.operator(size, p, key=key, **options) for key in member_keys]
        sketched = sketch_many(self._operators, x, 1).double()  # (K, n, q)
        flat = sketched.transpose(0, 1).reshape(n, k * size)
        gram, cross = flat.T @ flat, (flat.T @ y).unflatten(0, (k, size))  # (Kq, Kq), (K, q)
        own = torch.stack([gram[i : i + size, i : i + size] for i in range(0, k * size, size)])
        squares, v = torch.linalg.eigh(own)
        squares = torch.where(squares > squares[:, -1:] * max(n, size) * torch.finfo(x.dtype).eps, squares, 0.0)
        self._spectrum = squares / n
        shrink = _reciprocal(squares.unsqueeze(2) + n * self.lambdas).where(squares.unsqueeze(2) > 0, 0.0)  # (K, q, L)
        w = v @ (shrink * (v.mT @ cross.unsqueeze(2)))
        fitted = (cross.unsqueeze(2) * w).sum(1)  # (K, L): yᵀX Sₖwₖ
        each = (w * (own @ w)).sum(1)
        whole = (w.flatten(0, 1) * (gram @ w.flatten(0, 1))).sum(0) / k**2
        yy = y.square().sum()
        coef = self._operators[0]._adjoint(w.to(x.dtype), member_keys).double() / k
        df = (squares.unsqueeze(2) * shrink).sum(1) / n
        return _Path(coef, df, (yy - 2 * fitted.mean(0) + whole) / n, (yy - 2 * fitted + each) / n)

    def _rows(self, x: Tensor, y: Tensor) -> _Path:
        x, n = x.double(), len(x)
        coefs, dfs = [], []
        for key in keys.split(self.key, self.members):
            rows = sample_rows(torch.ones(n, device=x.device), self.size, key=key).indices
            u, s, vt = torch.linalg.svd(x[rows], full_matrices=False)
            s = torch.where(s > s[0] * max(x.shape) * torch.finfo(s.dtype).eps, s, 0.0).unsqueeze(1)
            shrink = _reciprocal(s.square() + self.size * self.lambdas).where(s > 0, 0.0)
            coefs.append(vt.T @ (s * shrink * (u.T @ y[rows]).unsqueeze(1)))
            dfs.append((s.square() * shrink).sum(0) / n)
        coef = torch.stack(coefs)
        errors = (y.unsqueeze(1) - x @ coef).square().mean(1)
        mean = coef.mean(0)
        return _Path(mean, torch.stack(dfs), (y.unsqueeze(1) - x @ mean).square().mean(0), errors)

    def _fitted(self) -> RidgeEnsemble:
        if not hasattr(self, "best"):
            raise RuntimeError("RidgeEnsemble: fit must be called first, got an ensemble without data")
        return self

    @property
    def mu(self) -> Tensor:
        """(L,): the penalties of the ridge regressions to which ensembles of more and more members converge."""
        op = "RidgeEnsemble"
        if self.over != "features" or not issubclass(self.operator, IID + ORTHOGONAL) or self.operator is CountSketch:
            raise ValueError(
                f"{op}: operator must be Gaussian, Rademacher, SJLT, SRHT or SRDCT, over features, for mu, got "
                f"{self.operator.__name__} over {self.over}"
            )
        first = self._fitted()._operators[0]
        if isinstance(first, SRHT) and first.length != first.m:  # columns of a larger H are not free
            raise ValueError(f"{op}: X must have a power of two of features for mu with SRHT, got {first.m}")
        alpha = self.size / first.m
        ev = self._spectrum.unsqueeze(2)
        if (self.lambdas == 0).any() and (self._spectrum == 0).any():
            raise ValueError(f"{op}: lambdas must be positive for mu where a sketch has not full rank, got 0")
        # λ·S(−α mean(ev/(ev + λ))), S(w) = α/(α + w) or α(1 + w)/(α + w), of which λ/(α + w) = 1/(α mean(1/(ev + λ)))
        mu = 1 / (1 / (ev + self.lambdas)).mean(1)
        if self.operator in ORTHOGONAL:
            mu = mu * (1 - alpha * (ev / (ev + self.lambdas)).mean(1))
        return mu.mean(0)

    def predict(self, X: Tensor, which: int | None = None) -> Tensor:
        """X (…, p) -> (…) with penalty number `which`, the best one by default; in the dtype of X or float64."""
        which = self._fitted().best if which is None else which
        _checks.float_tensor("RidgeEnsemble", "X", X)
        if X.dim() == 0 or X.shape[-1] != len(self.coef):
            raise ValueError(f"RidgeEnsemble: X must have {len(self.coef)} features, got {tuple(X.shape)}")
        return (X.double() @ self.coef[:, which] + self.offset[which]).to(X.dtype)

    def interval(self, X: Tensor, coverage: float = 0.9, which: int | None = None) -> tuple[Tensor, Tensor]:
        """Ends of intervals in which new responses lie with probability `coverage`, asymptotically: the prediction plus
        quantiles of the residuals of the fit divided by 1 − df, which have the law of new ones ("features" only)."""
        _checks.number("RidgeEnsemble", "coverage", coverage, 0.0, 1.0)
        if self.over != "features":
            raise ValueError(f"RidgeEnsemble: over must be 'features' for intervals, got {self.over!r}")
        which = self._fitted().best if which is None else which
        ends = torch.tensor([(1 - coverage) / 2, (1 + coverage) / 2], dtype=torch.float64, device=X.device)
        low, high = torch.quantile(self._residuals[:, which], ends).to(X.dtype)
        center = self.predict(X, which)
        return center + low, center + high


def _reciprocal(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1 / x, 0.0)
