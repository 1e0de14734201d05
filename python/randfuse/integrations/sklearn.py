"""scikit-learn estimators: random projections whose matrix is never stored, ridge ensembles that validate themselves.

They take the parameters of scikit-learn's classes of the same names and pass its tests. `components_` makes the
matrix when it is asked for.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn import random_projection
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import assert_all_finite, check_random_state
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from .. import keys, sketch
from .scipy import sketch_rows


class _Implicit:
    """Puts an operator in the place of the matrix that scikit-learn's projections store."""

    operator_: sketch.Operator
    features_: sketch.RowSample | None = None  # the features kept, where an entry in a column is too much

    def _key(self) -> torch.Tensor:
        return keys.key(int(check_random_state(self.random_state).randint(2**31 - 1)))  # type: ignore[attr-defined]

    @property
    def components_(self) -> Any:
        """The matrix in the dtype that was fitted, (n_components, n_features); sparse where the projection is."""
        if "operator_" not in vars(self):
            raise AttributeError("components_ comes with fit")
        eye = torch.eye(self.operator_.shape[0], dtype=torch.float64)
        columns = self.operator_.adjoint(eye)
        columns = columns if self.features_ is None else self.features_.adjoint(columns)
        dense = columns.T.contiguous().numpy().astype(self._dtype)
        return scipy.sparse.csr_matrix(dense) if isinstance(self, SparseRandomProjection) else dense

    @components_.setter
    def components_(self, made: np.ndarray) -> None:
        """`fit` assigns what `_make_random_matrix` returned, in the dtype of the data, which alone is kept."""
        self._dtype = made.dtype

    def transform(self, X: Any) -> Any:
        """Project X (n_samples, n_features) -> (n_samples, n_components)."""
        check_is_fitted(self)
        X = validate_data(
            self, X, accept_sparse=["csr", "csc"], dtype=[np.float64, np.float32], reset=False, ensure_all_finite=False
        )
        projected = self._project(X)
        # What is not finite in X is so in the projection, which is sooner looked through, if no feature is left out.
        with np.errstate(over="ignore", invalid="ignore"):
            suspect = self.features_ is not None or not np.isfinite(projected.sum())
        if suspect:
            assert_all_finite(X, estimator_name=type(self).__name__, input_name="X")
        return projected

    def _project(self, X: Any) -> Any:
        if scipy.sparse.issparse(X) and not self.operator_.takes_csr:
            return X @ self.components_.T
        if self.features_ is not None:
            factor = self.features_.probabilities.rsqrt().numpy().astype(X.dtype)
            kept = X[:, self.features_.indices.numpy()]
            X = kept.multiply(factor).tocsr() if scipy.sparse.issparse(X) else kept * factor
        projected = sketch_rows(self.operator_, X)
        if scipy.sparse.issparse(X) and not getattr(self, "dense_output", True):
            return scipy.sparse.csr_matrix(projected)
        return projected


class GaussianRandomProjection(_Implicit, random_projection.GaussianRandomProjection):
    """`sklearn.random_projection.GaussianRandomProjection` on `sketch.Gaussian`.

    >>> import numpy as np
    >>> GaussianRandomProjection(20, random_state=0).fit_transform(np.ones((5, 100))).shape
    (5, 20)
    """

    def _make_random_matrix(self, n_components: int, n_features: int) -> np.ndarray:
        self.operator_ = sketch.Gaussian(int(n_components), n_features, key=self._key())
        return np.empty(0)


class SparseRandomProjection(_Implicit, random_projection.SparseRandomProjection):
    """`sklearn.random_projection.SparseRandomProjection` on `sketch.SJLT`.

    A feature gets density·n_components nonzeros, rounded, one in each of so many blocks of components, instead of that
    number in the mean; where that is less than one, so many features in the mean are drawn and get one. `density_` is
    the share of nonzeros that there is.

    >>> import numpy as np
    >>> SparseRandomProjection(20, random_state=0).fit_transform(np.ones((5, 100))).shape
    (5, 20)
    """

    def _make_random_matrix(self, n_components: int, n_features: int) -> np.ndarray:
        density = 1 / np.sqrt(n_features) if self.density == "auto" else self.density
        n_components = int(n_components)
        key, nnz = self._key(), round(density * n_components)
        self.features_ = None
        if density * n_components < 0.75 and (kept := max(1, round(density * n_components * n_features))) < n_features:
            weights = torch.ones(n_features)
            self.features_ = sketch.sample_rows(weights, kept, key=keys.fold_in(key, 0))
            self.operator_ = sketch.CountSketch(n_components, kept, key=keys.fold_in(key, 1))
            self.density_ = kept / (n_components * n_features)
        elif nnz == n_components > 1024:
            self.operator_, self.density_ = sketch.Rademacher(n_components, n_features, key=key), 1.0
        else:
            self.operator_ = sketch.SJLT(n_components, n_features, nnz=max(1, nnz), key=key)
            self.density_ = max(1, nnz) / n_components
        return np.empty(0)


class SketchedRidgeCV(RegressorMixin, BaseEstimator):
    """`sketch.RidgeEnsemble` as a regressor: chooses the penalty by generalised cross-validation while it fits.

    Args:
        size: sketched features (or rows) of a member, as a number or a share of them.
        n_estimators: members.
        alphas: penalties λ (of nλ‖β‖²), or None for 26 around the mean square of the features.
        over: "features" or "rows".
        fit_intercept: on centred data.
        random_state: as in scikit-learn.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(100, 20))
    >>> SketchedRidgeCV(random_state=0).fit(x, x[:, 0]).coef_.shape
    (20,)
    """

    def __init__(
        self,
        size: int | float = 0.5,
        *,
        n_estimators: int = 8,
        alphas: Any = None,
        over: str = "features",
        fit_intercept: bool = True,
        random_state: Any = None,
    ) -> None:
        self.size = size
        self.n_estimators = n_estimators
        self.alphas = alphas
        self.over = over
        self.fit_intercept = fit_intercept
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SketchedRidgeCV:
        """Fit X (n_samples, n_features), y (n_samples,)."""
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], y_numeric=True, ensure_min_samples=2)
        y = column_or_1d(y, warn=True)
        whole = X.shape[1] if self.over == "features" else X.shape[0]
        size = int(self.size) if isinstance(self.size, Integral) else max(1, round(self.size * whole))
        key = keys.key(int(check_random_state(self.random_state).randint(2**31 - 1)))
        model = sketch.RidgeEnsemble(size, self.n_estimators, over=self.over, intercept=self.fit_intercept, key=key)
        alphas = None if self.alphas is None else torch.as_tensor(np.asarray(self.alphas, dtype=np.float64))
        self.ensemble_ = model.fit(torch.from_numpy(np.array(X)), torch.from_numpy(np.array(y, dtype=X.dtype)), alphas)
        self.coef_ = model.coef[:, model.best].numpy()
        self.intercept_ = float(model.offset[model.best])
        self.alpha_, self.gcv_ = float(model.lambdas[model.best]), model.gcv.numpy()
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The mean of the members' predictions, (n_samples,)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return X @ self.coef_ + self.intercept_
