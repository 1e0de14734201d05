"""scikit-learn's own tests on our estimators, SciPy's transform, TRAK's projector."""

from __future__ import annotations

import importlib
import math
import warnings

import pytest
import randfuse
import torch
from randfuse import _extension, keys

np = pytest.importorskip("numpy")
sklearn = pytest.importorskip("sklearn")
scipy_sparse = pytest.importorskip("scipy.sparse")

from randfuse.integrations import scipy as ours_scipy  # noqa: E402
from randfuse.integrations import sklearn as ours  # noqa: E402
from randfuse.integrations import trak  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

pytestmark = [
    pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
    pytest.mark.filterwarnings("ignore"),
]
PROJECTIONS = [ours.GaussianRandomProjection, ours.SparseRandomProjection]


# --- scikit-learn


@parametrize_with_checks([*(make(n_components=2) for make in PROJECTIONS), ours.SketchedRidgeCV()])
def test_scikit_learns_estimator_checks(estimator, check):
    check(estimator)


def scikit_learns_tests() -> dict:
    """The tests of sklearn.random_projection, on our classes."""
    with pytest.MonkeyPatch.context() as patch:
        for make in PROJECTIONS:
            patch.setattr(f"sklearn.random_projection.{make.__name__}", make)
        module = importlib.reload(importlib.import_module("sklearn.tests.test_random_projection"))
    return {name: test for name, test in vars(module).items() if name.startswith("test_")}


globals().update(scikit_learns_tests())


@pytest.fixture
def global_random_seed() -> int:
    return 42


@pytest.mark.parametrize("make", PROJECTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_transform_is_the_product_with_components(make, dtype, density):
    x = np.random.default_rng(0).normal(size=(7, 300)).astype(dtype)
    options = {"density": density, "dense_output": True} if make is ours.SparseRandomProjection else {}
    model = make(20, random_state=3, **options).fit(x)
    components = model.components_.toarray() if options else model.components_
    for data in (x, scipy_sparse.csr_array(x), scipy_sparse.csc_array(x)):
        got = model.transform(data)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, x @ components.T, rtol=0, atol=1e-4 if dtype == "float32" else 1e-12)
    if options:
        nonzeros = model.components_.nnz
        assert nonzeros == round(model.density_ * 20 * 300)
        assert abs(nonzeros / 6000 - density) < 0.02


@pytest.mark.parametrize("density", ["auto", 0.001], ids=["every feature", "few features"])
@pytest.mark.parametrize("layout", [np.asarray, scipy_sparse.csr_array], ids=["dense", "csr"])
def test_a_projection_refuses_what_is_not_finite_wherever_it_is(layout, density):
    x = np.random.default_rng(0).standard_normal((3, 50))
    model = ours.SparseRandomProjection(20, density=density, random_state=0).fit(x)
    model.transform(layout(x))
    model.transform(layout(np.full_like(x, 1e308)))  # sums overflow, the data are finite
    for value in (np.nan, np.inf, -np.inf):
        for column in range(50):
            bad = x.copy()
            bad[1, column] = value
            with pytest.raises(ValueError, match=r"Input X contains (NaN|infinity)"):
                model.transform(layout(bad))


@pytest.mark.parametrize("make", PROJECTIONS)
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_projection_keeps_squared_norms_in_the_mean(make, density):
    """z-test over 400 seeds at |z| < 5.5."""
    x = np.random.default_rng(0).normal(size=(1, 300))
    options = {"density": density} if make is ours.SparseRandomProjection else {}
    squares = np.array([(make(20, random_state=s, **options).fit_transform(x) ** 2).sum() for s in range(400)])
    assert abs(squares.mean() / (x**2).sum() - 1) < 5.5 * squares.std() / (x**2).sum() / 20


def test_sketched_ridge_is_the_ensemble():
    x = np.random.default_rng(0).normal(size=(200, 30))
    y = x[:, 0] * 3 + np.random.default_rng(1).normal(size=200)
    model = ours.SketchedRidgeCV(random_state=1).fit(x, y)
    np.testing.assert_allclose(model.predict(x), model.ensemble_.predict(torch.from_numpy(x)).numpy())
    assert model.gcv_.min() == model.gcv_[model.ensemble_.best]
    assert model.score(x, y) > 0.6
    assert ours.SketchedRidgeCV(np.int64(20), random_state=1).fit(x, y).ensemble_.size == 20
    assert ours.SketchedRidgeCV(20, over="rows", alphas=[0.1], random_state=1).fit(x, y).alpha_ == 0.1


# --- SciPy


@pytest.mark.parametrize("container", [np.asarray, scipy_sparse.csr_array, scipy_sparse.csc_matrix])
def test_clarkson_woodruff(container):
    """Arguments and law are SciPy's: one ±1 a column, norms kept in the mean, seeds and generators."""
    a = np.random.default_rng(0).normal(size=(500, 3))
    one = ours_scipy.clarkson_woodruff_transform(container(a), 40, 7)
    assert isinstance(one, np.ndarray)
    np.testing.assert_allclose(one, ours_scipy.clarkson_woodruff_transform(container(a), 40, rng=7))
    np.testing.assert_allclose(one, ours_scipy.clarkson_woodruff_transform(a, 40, np.random.default_rng(7)))
    assert not np.allclose(one, ours_scipy.clarkson_woodruff_transform(a, 40))
    s = ours_scipy.clarkson_woodruff_transform(container(np.eye(500)), 40, 7)
    np.testing.assert_allclose(s @ a, one, atol=1e-12)
    assert (np.abs(s).sum(0) == 1).all()
    assert set(np.unique(s)) == {-1.0, 0.0, 1.0}
    assert ours_scipy.clarkson_woodruff_transform(a.astype(np.float32), 40, 7).dtype == np.float32
    assert ours_scipy.clarkson_woodruff_transform([[1, 2], [3, 4]], 1, 7).dtype == np.float64
    backwards = ours_scipy.clarkson_woodruff_transform(a[::-1], 40, 7)
    np.testing.assert_array_equal(backwards, ours_scipy.clarkson_woodruff_transform(a[::-1].copy(), 40, 7))


def test_clarkson_woodruff_errors():
    with pytest.raises(TypeError, match="clarkson_woodruff_transform: input_matrix must hold real numbers, got compl"):
        ours_scipy.clarkson_woodruff_transform(np.ones((5, 2), dtype=complex), 3)
    with pytest.raises(ValueError, match=r"clarkson_woodruff_transform: input_matrix must be two-dimensional, got"):
        ours_scipy.clarkson_woodruff_transform(np.ones(5), 3)


# --- TRAK


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sjlt"])
def test_projector_keeps_inner_products(kind):
    """E⟨Sg, Sh⟩ = ⟨g, h⟩ over 300 models, |z| < 5.5; scales are TRAK's."""
    g = torch.randn(4, 700)
    unit = trak.Projector(700, 33, 5, kind)
    products = torch.stack([(p := unit.project(g, i).double()) @ p.T for i in range(300)]) / 33
    z = (products.mean(0) - g.double() @ g.double().T) / products.std(0) * 300**0.5
    assert z.abs().max() < 5.5
    assert not torch.equal(products[0], products[1]), "every model has its matrix"
    if kind == "rademacher":  # sums of ±1 have the parity of their number
        sums = unit.project(torch.ones(1, 700), 0) / 2
        torch.testing.assert_close(sums, sums.round())
    isometry = trak.Projector(700, 33, 5, kind, scale="isometry").project(g, 1)
    torch.testing.assert_close(isometry * 33**0.5, unit.project(g, 1))


def test_projector_of_parameters_and_large_values():
    parts = {"weight": torch.randn(3, 10, 20), "bias": torch.randn(3, 17)}
    whole = torch.cat([part.flatten(1) for part in parts.values()], 1)
    projector = trak.Projector(217, 50, 1, "rademacher", "cpu", 32)
    torch.testing.assert_close(projector.project(parts, 3), projector.project(whole, 3))
    large = projector.project(whole * 1e6, 3)  # float16 ends at 65504
    torch.testing.assert_close(large, projector.project(whole, 3) * 1e6, rtol=1e-4, atol=1.0)
    small = projector.project(whole * 1e-12, 3)  # and underflows at 6e-8
    torch.testing.assert_close(small, projector.project(whole, 3) * 1e-12, rtol=1e-4, atol=1e-16)
    projector.free_memory()
    assert not projector.project(whole.requires_grad_(), 3).requires_grad


def test_projector_beyond_two_to_the_32():
    """Parameters past 2³² have columns of their own: their sketch is that of the operator there."""
    projector = trak.Projector(2**33, 16, 0, "sjlt")
    start = 2**32 + 100
    operator = projector.operator(2)
    tail, head = operator[:, start : start + 50], operator[:, 100:150]
    assert not torch.equal(tail.to_dense(), head.to_dense())
    x = torch.randn(2, 50)
    torch.testing.assert_close(operator.apply(x, -1, offset=start), x @ tail.to_dense().T)


def test_dattris_function():
    feature = {"a": torch.randn(2, 5, 4), "b": torch.randn(2, 3)}
    project = trak.random_project(feature, 2, 8, 32, proj_seed=4, proj_type="sjlt")
    assert project(feature).shape == (2, 8)
    assert not torch.equal(project(feature), project(feature, ensemble_id=1))
    key = keys.fold_in(randfuse.key(4), 0)
    flat = torch.cat([part.flatten(1) for part in feature.values()], 1)
    torch.testing.assert_close(project(feature), randfuse.sketch.SJLT(8, 23, key=key, nnz=4).apply(flat, -1))


def test_projector_errors():
    with pytest.raises(ValueError, match="Projector: proj_type must be one of normal, rademacher, sjlt, got 'srht'"):
        trak.Projector(10, 4, proj_type="srht")
    with pytest.raises(ValueError, match=r"d must be in \[1, 2147483647\], got 0"):
        trak.Projector(10, 0)
    with pytest.raises(ValueError, match="Projector: grads must have 10 elements a sample, got 9"):
        trak.Projector(10, 4).project(torch.ones(2, 9), 0)
    with pytest.raises(ValueError, match=r"Projector: grads must have shape \(B, grad_dim\)"):
        trak.Projector(10, 4).project(torch.ones(10), 0)
    parts = {"weight": torch.ones(3, 3, 3), "scalar": torch.ones(3)}
    torch.testing.assert_close(trak.Projector(10, 4).project(parts), trak.Projector(10, 4).project(torch.ones(3, 10)))
    with pytest.raises(ValueError, match=r"Projector: grads must have the same samples, got \[3, 1\]"):
        trak.Projector(10, 4).project({"weight": torch.ones(3, 8), "bias": torch.ones(1, 2)})
    assert math.isfinite(trak.Projector(10, 4).project(torch.ones(1, 10)).sum())


def test_import_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(trak)
