"""Ridge ensembles: identities of sketched ridge regression, GCV against true risk, intervals; Kronecker projections."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
from randfuse import _extension, sketch

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

LAMBDAS = [0.05, 0.2, 1.0]
FREE = [sketch.Gaussian, sketch.Rademacher, sketch.SJLT, sketch.SRDCT]


def data(n: int, p: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Isotropic features, ‖β‖ = 1, noise of variance 1."""
    g = torch.Generator().manual_seed(seed)
    x, beta, noise = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, p), (p,), (n,)))
    beta = beta / beta.norm()
    return x, x @ beta + noise, beta


def risk(coef: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return (coef - beta.unsqueeze(1)).square().sum(0) + 1


def fit(x, y, size, members=2, operator=sketch.SJLT, seed=0, lambdas=LAMBDAS, **options):
    options = {"intercept": False} | options
    model = sketch.RidgeEnsemble(size, members, operator=operator, key=randfuse.key(seed), **options)
    return model.fit(x, y, lambdas)


@pytest.mark.parametrize("operator", [*FREE, sketch.CountSketch])
def test_solution_is_the_definition(operator):
    """β = mean of S (SᵀXᵀXS + nλ)⁻¹ SᵀXᵀy, df the trace, gcv of the residual; wide, tall and ridgeless."""
    for n, p, q in ((40, 30, 12), (15, 30, 20)):
        x, y, _ = data(n, p, 0)
        model = fit(x, y, q, 3, operator, lambdas=[0.0, 0.3])
        for which, lam in enumerate((0.0, 0.3)):
            coefs, dfs = [], []
            for s in model._operators:
                xs = x @ s.to_dense().T.double()
                inverse = torch.linalg.pinv(xs.T @ xs + n * lam * torch.eye(q, dtype=torch.float64), rtol=1e-10)
                coefs.append(s.to_dense().T.double() @ inverse @ xs.T @ y)
                dfs.append((xs @ inverse @ xs.T).trace() / n)
            beta, df = sum(coefs) / 3, sum(dfs) / 3
            torch.testing.assert_close(model.coef[:, which], beta, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model.df[which], df, rtol=1e-5, atol=1e-6)
            if df < 0.999:
                expected = (y - x @ beta).square().mean() / (1 - df) ** 2
                torch.testing.assert_close(model.gcv[which], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("operator", FREE)
def test_equivalent_ridge(operator):
    """n = 600, p = 800, q = 400: the degrees of freedom are those of ridge regression with μ, within 0.003."""
    x, y, _ = data(600, 800, 1)
    model = fit(x, y, 400, 1, operator)
    ev = torch.linalg.eigvalsh(x.T @ x / 600)
    df = torch.stack([(ev / (ev + mu)).sum() / 600 for mu in model.mu])
    assert (model.df - df).abs().max() < 0.003, (model.df, df)


def test_count_sketch_fails_the_equivalence():
    """Negative control: one nonzero a column is not free of the data; mu refuses it, and its formula would be off."""
    x, y, _ = data(600, 800, 1)
    model = fit(x, y, 400, 1, sketch.CountSketch)
    with pytest.raises(ValueError, match="operator must be Gaussian, .* for mu, got CountSketch over features"):
        _ = model.mu
    model.operator = sketch.Gaussian
    ev = torch.linalg.eigvalsh(x.T @ x / 600)
    df = torch.stack([(ev / (ev + mu)).sum() / 600 for mu in model.mu])
    assert (model.df - df).abs().max() > 0.01, "the test above must see this"


def test_gcv_is_the_risk_and_the_limit_that_of_ridge():
    """Over 24 data sets of n = 300, p = 400, q = 200 the mean difference is within 5 standard errors + 1 %."""
    gaps, limits = [], []
    for seed in range(24):
        x, y, beta = data(300, 400, seed)
        model = fit(x, y, 200, 2, sketch.SRDCT, seed)
        gaps.append(model.gcv - risk(model.coef, beta))
        eye = torch.eye(400, dtype=torch.float64)
        ridge = torch.stack([torch.linalg.solve(x.T @ x / 300 + mu * eye, x.T @ y / 300) for mu in model.mu], 1)
        limits.append(model.gcv_limit - risk(ridge, beta))
    for difference in (torch.stack(gaps), torch.stack(limits)):
        error = difference.std(0) / 24**0.5
        assert (difference.mean(0).abs() < 5 * error + 0.02).all(), (difference.mean(0), error)
        assert (error < 0.1).all(), "the test must have power"


def test_ensemble_trick():
    """R_K = R_∞ + (R_1 − R_∞)/K: members of one fit tell the risk of others."""
    x, y, beta = data(400, 300, 3)
    one, eight = (risk(fit(x, y, 150, k, sketch.SRDCT, seed=k).coef, beta) for k in (1, 8))
    few = torch.stack([risk(fit(x, y, 150, 1, sketch.SRDCT, seed=s).coef, beta) for s in range(9, 17)]).mean(0)
    limit = fit(x, y, 150, 64, sketch.SRDCT, seed=5)
    many = risk(limit.coef, beta)
    torch.testing.assert_close((8 * eight - few) / 7, many, rtol=0.04, atol=0)
    assert (one > eight).all()
    torch.testing.assert_close(limit.gcv_limit, limit.gcv, rtol=0.03, atol=0)


def test_corrected_gcv_of_row_ensembles():
    """Plain GCV is not consistent for subsamples; the corrected one is, for K = 1 and 4, m = n/2."""
    gaps, plain = {1: [], 4: []}, []
    for seed in range(24):
        x, y, beta = data(300, 100, seed)
        for k in gaps:
            model = fit(x, y, 150, k, seed=seed, over="rows", lambdas=[0.0, 0.05, 0.5])
            true = risk(model.coef, beta)
            gaps[k].append(model.gcv - true)
            if k == 4:
                plain.append((y[:, None] - x @ model.coef).square().mean(0) / (1 - model.df) ** 2 - true)
    for k, values in gaps.items():
        difference = torch.stack(values)
        error = difference.std(0) / 24**0.5
        assert (difference.mean(0).abs() < 5 * error + 0.02).all(), (k, difference.mean(0), error)
    biased = torch.stack(plain)
    assert biased.mean(0)[0] > 5 * biased.std(0)[0] / 24**0.5, "the control: the uncorrected one is seen to be off"


def test_rows_are_distinct_and_whole_samples_are_ridge():
    x, y, _ = data(50, 8, 0)
    model = fit(x, y, 50, 3, over="rows")
    for which, lam in enumerate(LAMBDAS):
        ridge = torch.linalg.solve(x.T @ x + 50 * lam * torch.eye(8, dtype=torch.float64), x.T @ y)
        torch.testing.assert_close(model.coef[:, which], ridge)


def test_the_best_penalty_has_a_number_for_its_gcv():
    """One sample, one feature, no penalty: error and 1 − df are 0, and so is nothing known of the risk."""
    model = sketch.RidgeEnsemble(1, 1, intercept=False).fit(torch.tensor([[2.0]]), torch.tensor([2.0]), [0.0, 1.0])
    assert model.gcv.isnan().tolist() == [True, False]
    assert model.best == 1


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda new, model: new.predict(torch.ones(2, 3)), RuntimeError, "fit must be called first"),
    (lambda new, model: new.interval(torch.ones(2, 3)), RuntimeError, "fit must be called first"),
    (lambda new, model: new.mu, RuntimeError, "fit must be called first"),
    (lambda new, model: model.predict(torch.ones(2, 4)), ValueError, "X must have 3 features"),
    (lambda new, model: model.predict([1.0]), TypeError, "X must be a Tensor"),
])  # fmt: skip
def test_errors_of_predictions(call, error, message):
    new = sketch.RidgeEnsemble(2, 2)
    with pytest.raises(error, match=f"^RidgeEnsemble: {message}"):
        call(new, sketch.RidgeEnsemble(2, 2).fit(torch.randn(9, 3), torch.randn(9)))


def test_intercept_and_prediction():
    x, y, _ = data(200, 20, 0)
    model = fit(x.float() + 5, y.float() - 100, 20, 2, intercept=True, lambdas=None)
    assert len(model.lambdas) == 26
    assert model.gcv[model.best] == model.gcv.min()
    prediction = model.predict(x.float() + 5)
    assert prediction.dtype == torch.float32
    assert (prediction - (y - 100)).square().mean() < 1.5
    shifted = fit(x, y, 20, 2, intercept=True, lambdas=model.lambdas.tolist())
    torch.testing.assert_close(shifted.gcv, model.gcv, rtol=1e-3, atol=0)


def test_intervals_cover():
    """90 % intervals of 4000 new responses: within 5 points (3 deviations of quantiles of 400), at every
    penalty; residuals of the fit itself do not."""
    x, y, beta = data(400, 300, 1)
    model = fit(x, y, 150, 4)
    new = torch.randn(4000, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    response = new @ beta + torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    for which in range(3):
        low, high = model.interval(new, 0.9, which)
        assert abs(((low < response) & (response < high)).double().mean() - 0.9) < 0.05
    raw = torch.quantile(model._residuals[:, 0] * (1 - model.df[0]), torch.tensor([0.05, 0.95], dtype=torch.float64))
    center = model.predict(new, 0)
    naive = ((center + raw[0] < response) & (response < center + raw[1])).double().mean()
    assert naive < 0.8, "the control"


X, Y = torch.randn(30, 6), torch.randn(30)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sketch.RidgeEnsemble(7).fit(X, Y), r"size must be in \[1, 6\], got 7"),
        (lambda: sketch.RidgeEnsemble(31, over="rows").fit(X, Y), r"size must be in \[1, 30\], got 31"),
        (lambda: sketch.RidgeEnsemble(3, over="columns"), "over must be one of features, rows"),
        (lambda: sketch.RidgeEnsemble(3, operator=sketch.TensorSketch), "operator must be a class of sketches"),
        (lambda: sketch.RidgeEnsemble(3).fit(X, Y[:4]), "y must have 30 rows, got 4"),
        (lambda: sketch.RidgeEnsemble(3).fit(X, X), "y must be a vector"),
        (lambda: sketch.RidgeEnsemble(3).fit(X, Y * math.nan), "y must be finite"),
        (lambda: sketch.RidgeEnsemble(3).fit(X, Y, [-1.0]), "lambdas must be a list of finite numbers of at least 0"),
        (lambda: sketch.RidgeEnsemble(9, over="rows").fit(X, Y).interval(X), "over must be 'features' for intervals"),
        (lambda: sketch.RidgeEnsemble(9, over="rows").fit(X, Y).mu, "operator must be .* for mu, got SJLT over rows"),
        (lambda: sketch.RidgeEnsemble(3, operator=sketch.SRHT).fit(X, Y).mu, "X must have a power of two of features"),
        (lambda: fit(torch.randn(4, 9), torch.randn(4), 8, lambdas=[0.0]).mu, "lambdas must be positive for mu"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^RidgeEnsemble: {message}"):
        call()


# --- Kronecker projections


def spd(n: int) -> torch.Tensor:
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return a @ a.T / n + torch.eye(n, dtype=torch.float64)


def dense(a: torch.Tensor, w: torch.Tensor, form: str) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(w)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    kron = torch.kron(w, torch.eye(len(w), dtype=w.dtype)) if form == "one-sided" else torch.kron(root, root)
    b = a.flatten(1) @ kron
    return b.T @ torch.linalg.solve(b @ b.T, b)


@pytest.mark.parametrize("form", ["one-sided", "two-sided"])
@pytest.mark.parametrize("m", [5, 60])
def test_kronecker_projection_through_updates(m, form):
    """m = 5 factors anew, m = 60 corrects the inverse; after 40 updates, some of them to and fro, still exact."""
    n, g = 9, torch.Generator().manual_seed(1)
    a, w, h = torch.randn(m, n, n, generator=g).double(), spd(n), torch.randn(2, n, n, generator=g).double()
    projection = sketch.KroneckerProjection(a, w, form=form)
    for step in range(41):
        expected = (h.flatten(1) @ dense(a, w, form)).view(h.shape)
        torch.testing.assert_close(projection.project(h), expected, rtol=1e-7, atol=1e-8)
        u = torch.randn(n, 2, generator=g).double()
        c = torch.tensor([0.3, 0.0 if step == 7 else -0.01]).double()
        projection.update(u, c)
        w = w + u @ torch.diag(c) @ u.T
        if step % 4 == 3:
            projection.update(u, -c)
            w = w - u @ torch.diag(c) @ u.T


@pytest.mark.parametrize("m", [5, 60])
def test_a_kronecker_update_that_fails_changes_nothing(m):
    w, h = spd(9), torch.randn(9, 9, dtype=torch.float64)
    projection = sketch.KroneckerProjection(torch.randn(m, 9, 9, dtype=torch.float64), w, form="two-sided")
    before, u = projection.project(h), torch.linalg.eigh(w).eigenvectors[:, :1]
    with pytest.raises(ValueError, match=r"^KroneckerProjection.update: W must be positive definite, got an eigenv"):
        projection.update(u, torch.tensor([-99.0]))
    torch.testing.assert_close(projection.W, w)
    torch.testing.assert_close(projection.project(h), before)


def test_kronecker_query_is_unbiased():
    """With one sketch, E answer = P h in each of 36 coordinates, |z| < 5 over 300 keys; more sketches are steadier."""
    n, m = 6, 10
    a, h = torch.randn(m, n, n, dtype=torch.float64), torch.randn(n, n, dtype=torch.float64)
    exact = sketch.KroneckerProjection(a, spd(n)).project(h)

    def error(sketches: int, seed: int) -> torch.Tensor:
        key = randfuse.key(seed)
        return sketch.KroneckerProjection(a, spd(n), sketches=sketches, size=12, key=key).query(h) - exact

    one = torch.stack([error(1, seed) for seed in range(300)])
    assert (one.mean(0) / one.std(0) * 300**0.5).abs().max() < 5
    many = torch.stack([error(15, seed) for seed in range(20)])
    assert many.square().mean() < 0.4 * one.square().mean()
    moving = sketch.KroneckerProjection(a, spd(n), sketches=3, size=36, key=randfuse.key(0))
    before = moving.query(h)
    moving.update(torch.ones(n, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert not torch.allclose(moving.query(h), before, atol=1e-3), "kept products follow W"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, w: sketch.KroneckerProjection(a, w[:2]), r"W must be symmetric, got \(2, 3\)"),
        (lambda a, w: sketch.KroneckerProjection(a, w + torch.ones(3, 3).triu(1)), "W must be symmetric"),
        (lambda a, w: sketch.KroneckerProjection(a[0], w), r"A must have shape \(m, 3, 3\)"),
        (lambda a, w: sketch.KroneckerProjection(torch.cat((a, a)), w), "A must be linearly independent"),
        (lambda a, w: sketch.KroneckerProjection(a, w, form="both"), "form must be one of one-sided, two-sided"),
        (lambda a, w: sketch.KroneckerProjection(a, -w, form="two-sided"), "W must be positive definite, got an eig"),
        (lambda a, w: sketch.KroneckerProjection(a, w, sketches=2, size=4), "sketches must be odd"),
        (lambda a, w: sketch.KroneckerProjection(a, w, sketches=1, size=10), r"size must be in \[1, 9\], got 10"),
        (lambda a, w: sketch.KroneckerProjection(a, w).query(w), "sketches must be at least 1, got 0"),
        (lambda a, w: sketch.KroneckerProjection(a, w).project(w[:2]), r"h must be torch.float32 \(…, 3, 3\)"),
        (lambda a, w: sketch.KroneckerProjection(a, w).update(w, w), r"c must be finite with shape \(3,\)"),
    ],
)
def test_kronecker_errors(call, message):
    with pytest.raises(ValueError, match=f"^KroneckerProjection[^:]*: {message}"):
        call(torch.randn(2, 3, 3), torch.eye(3))
