"""The laws of sketching operators, the same for all of them: moments, blocks, shards, adjoints, errors."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
from randfuse import _extension, reference, sketch, use_backend
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

pytestmark = [
    pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
]

OPERATORS = {
    "Gaussian": sketch.Gaussian,
    "Rademacher": sketch.Rademacher,
    "CountSketch": sketch.CountSketch,
    "SJLT": sketch.SJLT,
    "SJLT8": lambda d, m, **kw: sketch.SJLT(d, m, nnz=8, **kw),
    "SRHT": sketch.SRHT,
    "SRDCT": sketch.SRDCT,
}
SPARSE = ("CountSketch", "SJLT", "SJLT8")
every = pytest.mark.parametrize("name", OPERATORS)
KEY = randfuse.key(11)

# --- moments. z-tests at |z| < 5.5 with fixed keys: 7 operators, 7 vectors, 2 moments, 4e-8 each, so a right
# implementation fails one of them with probability 4e-6. A bias of 1 % of ‖x‖² is seen (z = 7 for d = 24, T = 4000).

D, M, T = 24, 300, 4000


def vectors() -> torch.Tensor:
    """(M, 7): ones, one-hot, two-hot at distances 1, 16, 32 and 128, and a random vector; all of norm 1."""
    x = torch.zeros(M, 7, dtype=torch.float64)
    x[:, 0] = 1
    x[137, 1] = 1
    for column, distance in enumerate((1, 16, 32, 128), 2):
        x[7, column] = x[7 + distance, column] = 1
    x[:, 6] = torch.randn(M, dtype=torch.float64)
    return x / x.norm(dim=0)


def variance(name: str, x: torch.Tensor) -> torch.Tensor:
    """Closed form of Var‖Sx‖² for ‖x‖ = 1."""
    spread = 1 - x.pow(4).sum(0)
    if name == "Gaussian":
        return torch.full_like(spread, 2 / D)
    if name == "SRHT":
        return 2 / D * (512 - D) / 511 * spread
    return 2 / D * spread


def norms(y: torch.Tensor) -> torch.Tensor:
    return y.square().sum(1)  # (T, 7) of (T, D, 7)


def z_of_mean(squares: torch.Tensor, expected: float) -> torch.Tensor:
    """z-scores by the sample's own deviation; 0 where the sample is constant and right."""
    error, deviation = squares.mean(0) - expected, squares.std(0)
    return torch.where((error.abs() < 1e-9) & (deviation < 1e-9), 0.0, error / deviation * len(squares) ** 0.5)


@every
def test_moments_are_the_closed_forms(name):
    x, operator = vectors(), OPERATORS[name](D, M, key=KEY)
    squares = norms(operator._sketch(x, randfuse.split(KEY, T)))
    assert z_of_mean(squares, 1.0).abs().max() < 5.5, z_of_mean(squares, 1.0)
    if name == "SRDCT":  # no closed form: the rows of the cosine transform are not flat
        return
    expected = variance(name, x)
    deviations = (squares - 1).square() - expected
    assert z_of_mean(deviations, 0.0).abs().max() < 5.5, (squares.var(0), expected)


def test_shared_signs_fail_the_moment_test():
    """Negative control: two halves of the columns with the same signs, as when threads seed alike."""
    x, keys = vectors(), randfuse.split(KEY, T)
    half = M // 2
    rows, signs = reference.sparse_sketch_entries(keys, D, 1, 0, M)
    signs[:, :, half:] = signs[:, :, :half]
    y = torch.zeros(T, D, 7, dtype=torch.float64)
    y.scatter_add_(1, rows[:, 0, :, None].expand(-1, -1, 7), signs[:, 0, :, None] * x)
    assert z_of_mean(norms(y), 1.0).abs().max() > 5.5, "the test must see shared signs"


@every
def test_identity_in_the_mean_entry_by_entry(name):
    """E[SᵀS] = I: 780 + 40 entries at |z| < 5.5, a false alarm in 3e4."""
    keys, m = randfuse.split(randfuse.key(5), 2000), 40
    operator = OPERATORS[name](D, m, key=KEY)
    s = operator._sketch(torch.eye(m, dtype=torch.float64), keys)
    gram = s.mT @ s
    z = z_of_mean((gram - torch.eye(m)).flatten(1), 0.0)
    assert z.abs().max() < 5.5, f"entry {int(z.abs().argmax())}: z = {z.abs().max():.1f}"


@every
def test_keys_and_distant_columns_are_independent(name):
    """E⟨S₁x, S₂y⟩ = 0 for neighbouring keys; nearly equal columns far apart do not correlate."""
    keys, x = torch.arange(T), torch.ones(M, 1, dtype=torch.float64) / M**0.5
    y = OPERATORS[name](D, M, key=KEY)._sketch(x, keys).squeeze(-1)
    assert z_of_mean((y[0::2] * y[1::2]).sum(1), 0.0).abs() < 5.5
    if name.startswith("SR"):
        return
    operator = OPERATORS[name](D, 2**62, key=KEY)
    for power in (2, 7, 12, 31, 32, 34, 39, 41, 61):  # 2^34 and 2^39: where blocks reach i
        a, b = operator[:, :2000].to_dense(), operator[:, 2**power : 2**power + 2000].to_dense()
        products = (a * b).sum(0).double()
        same = int((products == a.square().sum(0)).sum())
        assert z_of_mean(products, 0.0).abs() < 5.5, f"columns at distance 2^{power}"
        assert same < 400, f"{same} of 2000 columns at distance 2^{power} are the same"


def test_kinds_with_one_key_share_nothing():
    """z-tests of the inner products of their images, 4000 keys, 21 pairs at |z| < 5.5."""
    keys, x = torch.arange(T), torch.randn(M, 1, dtype=torch.float64)
    images = {name: make(D, M, key=KEY)._sketch(x, keys).squeeze(-1) for name, make in OPERATORS.items()}
    for one in images:
        for two in images:
            if one < two and {one, two} - set(SPARSE):
                assert z_of_mean((images[one] * images[two]).sum(1), 0.0).abs() < 5.5, (one, two)
    kept = [OPERATORS[name](D, 512, key=KEY)._kept(keys[:3], 1) for name in ("SRHT", "SRDCT")]
    assert not torch.equal(*kept), "the rows kept must differ too"


# --- the operator is the matrix


def close(actual: torch.Tensor, s: torch.Tensor, x: torch.Tensor) -> None:
    """actual = s x, for s as float32 holds it; x float64, or rounded to what the operator was given."""
    assert_close_to_float64(actual.double(), s.double() @ x.double(), (s @ x.float()).double(), factor=4, tiny=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_products_are_those_of_the_dense_matrix(name, dtype):
    operator, s = OPERATORS[name](D, M, key=KEY), OPERATORS[name](D, M, key=KEY).to_dense()
    assert s.shape == operator.shape == (D, M)
    a, y = torch.randn(M, 37).to(dtype), torch.randn(D, 5).to(dtype)
    result = operator @ a
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(result, s, a)
    close((a.T @ operator.T).T, s, a)
    close(operator.T @ y, s.T, y)
    close((y.T @ operator).T, s.T, y)
    close((operator @ a[:, 0]).unsqueeze(1), s, a[:, :1])
    cube = torch.randn(3, M, 4).to(dtype)
    close((operator @ cube)[1], s, cube[1])
    assert_bitwise_equal(operator.apply(cube, 1), operator @ cube)
    assert_bitwise_equal(operator.T.to_dense(), s.T)
    assert operator.T.T is operator


@every
def test_blocks_are_slices_of_the_dense_matrix(name):
    operator = OPERATORS[name](D, M, key=KEY)
    s, a, y = operator.to_dense(), torch.randn(M, 3), torch.randn(D, 3)
    for rows, cols in (
        ((0, 24), (5, 300)),
        ((3, 7), (0, 128)),
        ((11, 12), (127, 129)),
        ((4, 4), (9, 9)),
        ((2, 23), (33, 290)),
    ):
        block = operator[slice(*rows), slice(*cols)]
        part = s[slice(*rows), slice(*cols)]
        exact = {} if name in ("SRHT", "SRDCT") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(block.to_dense(), part, **exact or {"rtol": 1e-5, "atol": 1e-6})
        torch.testing.assert_close(block @ a[slice(*cols)], part @ a[slice(*cols)], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block.T @ y[slice(*rows)], part.T @ y[slice(*rows)], rtol=1e-4, atol=1e-5)
    twice = operator[2:20, 10:200][3:9, 5:50]
    torch.testing.assert_close(twice.to_dense(), s[5:11, 15:60])


@every
def test_shards_add_up(name):
    operator, a = OPERATORS[name](D, M, key=KEY), torch.randn(M, 6, dtype=torch.float64)
    out = torch.full((D, 6), math.nan, dtype=torch.float64)
    for count, start in enumerate(range(0, M, 77)):
        operator.apply(a[start : start + 77], offset=start, beta=float(count > 0), out=out)
    torch.testing.assert_close(out, operator @ a)
    operator.apply(a, alpha=2.0, beta=-0.5, out=out)
    torch.testing.assert_close(out, 1.5 * (operator @ a))
    back = torch.ones(M, 6, dtype=torch.float64)
    operator.adjoint(out, alpha=3.0, beta=2.0, out=back)
    torch.testing.assert_close(back, 2 + 3 * (operator.T @ out))


@every
def test_adjoint_and_derivatives(name):
    operator = OPERATORS[name](D, 40, key=KEY) if name != "SRDCT" else OPERATORS[name](D, 41, key=KEY)
    m = operator.m
    a = torch.randn(m, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(D, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(((operator @ a) * y).sum(), (a * (operator.T @ y)).sum())
    assert torch.autograd.gradcheck(lambda a: operator @ a, a, fast_mode=True)
    assert torch.autograd.gradcheck(lambda y: operator.T @ y, y, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a: (operator @ a) ** 2, a, fast_mode=True)
    assert (operator.T @ y.detach()[:, :0]).shape == (m, 0)
    assert operator.adjoint(y.detach().new_zeros(2, 0, D), -1).shape == (2, 0, m)
    half = a.detach().bfloat16().requires_grad_()
    (operator @ half).sum().backward()
    assert half.grad.dtype == torch.bfloat16


@every
def test_the_number_of_threads_and_repetition_change_no_bit(name):
    operator, a, y = OPERATORS[name](100, 5000, key=KEY), torch.randn(5000, 70), torch.randn(100, 9)
    before, threads = (operator @ a, operator.T @ y), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_bitwise_equal(operator @ a, before[0], name=f"{count} threads")
            assert_bitwise_equal(operator.T @ y, before[1], name=f"{count} threads, adjoint")
    finally:
        torch.set_num_threads(threads)


@every
def test_many_sketches_are_the_single_ones(name):
    operators = [OPERATORS[name](D, M, key=k) for k in randfuse.split(KEY, 3)]
    a = torch.randn(4, M, 5)
    many = sketch.sketch_many(operators, a, 1)
    torch.testing.assert_close(many, torch.stack([s.apply(a, 1) for s in operators]), rtol=1e-5, atol=1e-5)
    b = torch.randn(M, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: sketch.sketch_many(operators, b), b, fast_mode=True)
    with pytest.raises(ValueError, match="operators must differ in their keys alone"):
        sketch.sketch_many([operators[0], OPERATORS[name](D, M + 1, key=KEY)], a, 1)


@pytest.mark.parametrize("name", SPARSE)
def test_csr_input(name):
    operator, a = OPERATORS[name](D, M, key=KEY), torch.randn(M, 50).relu() * (torch.rand(M, 50) < 0.1)
    torch.testing.assert_close(operator @ a.to_sparse_csr(), operator @ a, rtol=1e-5, atol=1e-6)
    tall = OPERATORS[name](4096, M, key=KEY)  # 32 columns of it are a strip
    torch.testing.assert_close(tall @ a.to_sparse_csr(), tall @ a, rtol=1e-5, atol=1e-6)
    block = operator[3:20, 100:200]
    torch.testing.assert_close(block @ a[100:200].to_sparse_csr(), block @ a[100:200], rtol=1e-5, atol=1e-6)
    with use_backend("reference"):
        torch.testing.assert_close(operator @ a.to_sparse_csr(), operator @ a, rtol=1e-5, atol=1e-6)


@every
def test_vmap_and_compile(name):
    operator, a = OPERATORS[name](D, M, key=KEY), torch.randn(6, M, 4)
    batched = torch.vmap(lambda x: operator.apply(x, 0))(a)
    torch.testing.assert_close(batched, operator.apply(a, 1), rtol=1e-5, atol=1e-5)
    keys = randfuse.split(KEY, 6)
    if not name.startswith("SR"):
        each = torch.vmap(lambda x, k: OPERATORS[name](D, M, key=k).apply(x, 0))(a, keys)
        torch.testing.assert_close(each[2], OPERATORS[name](D, M, key=keys[2]) @ a[2], rtol=1e-5, atol=1e-5)


def test_compiled_without_a_graph_break():
    def f(a, key):
        return sketch.SJLT(D, M, key=key).apply(a)  # dynamo knows no @ of other objects than tensors

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    a = torch.randn(M, 3, requires_grad=True)
    for seed in range(6):
        torch.testing.assert_close(compiled(a, randfuse.key(seed)), f(a, randfuse.key(seed)))
    compiled(a, KEY).sum().backward()
    assert a.grad is not None


def test_an_sjlt_column_has_a_nonzero_in_each_block():
    operator = sketch.SJLT(30, 5000, key=KEY, nnz=4)  # 4 does not divide 30: blocks of 7, 8, 7, 8 rows
    rows, signs = operator.entries()
    for t, (low, high) in enumerate(((0, 7), (7, 15), (15, 22), (22, 30))):
        counts = torch.bincount(rows[t] - low, minlength=high - low)
        assert len(counts) == high - low, "rows must lie in the block"
        assert ((counts - 5000 / (high - low)).abs() < 6 * (5000 / (high - low)) ** 0.5).all()
    assert signs.abs().min() == 1
    assert abs(int(signs.sum())) < 6 * 20000**0.5


@pytest.mark.parametrize("m", [1, 2, 3, 100])
def test_trigonometric_with_all_rows_is_an_isometry(m):
    for make in (sketch.SRHT, sketch.SRDCT):
        length = make(1, m, key=KEY).length
        s = make(length, m, key=KEY).to_dense()
        torch.testing.assert_close(s.T @ s, torch.eye(m), atol=1e-5, rtol=0)


def test_tensor_sketch_is_the_polynomial_kernel_in_the_mean():
    """300 keys, mean of ⟨TS(x), TS(y)⟩ against ⟨x, y⟩^q by z-test; equal to the sketch of x ⊗ x entry by entry."""
    x = torch.nn.functional.normalize(torch.randn(2, 20, dtype=torch.float64), dim=1)
    for degree in (1, 2, 3):
        products = torch.stack([
            (f[0] * f[1]).sum()
            for f in (sketch.TensorSketch(32, 20, degree=degree, key=randfuse.key(k))(x) for k in range(300))
        ])  # fmt: skip
        z = z_of_mean(products.unsqueeze(1), float((x[0] @ x[1]) ** degree))
        assert z.abs() < 5, f"degree {degree}: z = {z.item():.1f}"
    ts = sketch.TensorSketch(32, 20, degree=2, key=KEY)
    (r0, s0), (r1, s1) = (f.entries() for f in ts.factors)
    place = (r0[0][:, None] + r1[0]) % 32
    tensor = torch.outer(x[0], x[0]) * s0[0][:, None] * s1[0]
    torch.testing.assert_close(
        ts(x)[0], torch.zeros(32, dtype=torch.float64).index_add(0, place.flatten(), tensor.flatten())
    )
    assert ts(x[:0]).shape == (0, 32)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(ts, leaf, fast_mode=True)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: sketch.SJLT(0, 10), ValueError, r"SJLT: d must be in \[1, "),
    (lambda: sketch.SJLT(2**31, 10), ValueError, r"SJLT: d must be in \[1, "),
    (lambda: sketch.Gaussian(4, 0), ValueError, r"Gaussian: m must be in"),
    (lambda: sketch.Gaussian(4.0, 10), TypeError, "Gaussian: d must be an int, got float"),
    (lambda: sketch.SJLT(8, 10, nnz=9), ValueError, r"SJLT: nnz must be in \[1, min\(d, 1024\)\], got 9"),
    (lambda: sketch.SJLT(8, 10, nnz=0), ValueError, "SJLT: nnz must be in"),
    (lambda: sketch.SRHT(17, 10, key=KEY), ValueError, "SRHT: d must be at most 16"),
    (lambda: sketch.SRDCT(11, 10, key=KEY), ValueError, "SRDCT: d must be at most 10"),
    (lambda: sketch.SRHT(8, 2**24 + 1), ValueError, r"SRHT: m must be in \[1, 2\*\*24\]"),
    (lambda: sketch.Rademacher(4, 10, key=3), TypeError, "Rademacher: key must be an int64 Tensor"),
    (lambda: sketch.TensorSketch(4, 10, degree=0), ValueError, "TensorSketch: degree must be a positive int, got 0"),
    (lambda: sketch.SJLT(8, 10) @ torch.ones(11, 2), ValueError, "SJLT: a must have 10 elements along dim 0, got 11"),
    (lambda: sketch.SJLT(8, 10).T @ torch.ones(9), ValueError, "SJLT: y must have 8 elements along dim 0, got 9"),
    (lambda: sketch.SJLT(8, 10) @ torch.ones(10, dtype=torch.int64), TypeError, "SJLT: a must be float32"),
    (lambda: sketch.SJLT(8, 10) @ [1.0], TypeError, "SJLT: a must be a Tensor, got list"),
    (lambda: sketch.SJLT(8, 10).apply(torch.ones(10), 1), IndexError, r"SJLT: dim must be in \[-1, 0\], got 1"),
    (lambda: sketch.SJLT(8, 10) @ torch.tensor(1.0), ValueError, "SJLT: the data must have at least one dimension"),
    (lambda: sketch.SJLT(8, 10).apply(torch.ones(4), offset=7), ValueError, r"SJLT: offset must be in \[0, 10 - 4\]"),
    (lambda: sketch.SJLT(8, 10).apply(torch.ones(10), beta=1.0), ValueError, "SJLT: beta must be 0 without out"),
    (lambda: sketch.SJLT(8, 10).apply(torch.ones(10), out=torch.ones(7)), ValueError, "SJLT: out must be"),
    (lambda: sketch.SJLT(8, 10)[0:4], TypeError, "SJLT: index must be two slices"),
    (lambda: sketch.SJLT(8, 10)[0:4, ::2], ValueError, "SJLT: index must have step 1, got 2"),
    (lambda: sketch.SRHT(8, 10) @ torch.eye(10).to_sparse_csr(), TypeError, "SRHT: a must be dense"),
    (lambda: sketch.Gaussian(8, 10) @ torch.eye(10).to_sparse_csr(), TypeError, "Gaussian: a must be dense"),
    (lambda: torch.eye(10).to_sparse_csr() @ sketch.SJLT(8, 10).T, ValueError, "SJLT: dim must be 0 for a CSR"),
    (lambda: sketch.SJLT(8, 10) @ torch.eye(10).to_sparse_coo(), TypeError, "SJLT: a must be dense or CSR"),
    (lambda: sketch.sketch_many([], torch.ones(3)), ValueError, "sketch_many: operators must hold at least one"),
])  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
