"""The kernels under CountSketch and SJLT: equal to the reference, the same bits on every instruction set."""

from __future__ import annotations

import pytest
import torch
from randfuse import _backends, _extension, sketch, use_backend
from randfuse.ops.sparse_sketch import sparse_sketch, sparse_sketch_adjoint, sparse_sketch_entries
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

pytestmark = [
    pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# m, n, d, nnz: empty, single, one strip, strips (130 columns of 4096 rows), chunks (m ≥ 2048), ragged, d < 16, and,
# taken by number (nnz ≥ 8), several batches and strips.
SHAPES = [
    (0, 4, 8, 2),
    (5, 0, 8, 2),
    (1, 1, 1, 1),
    (3000, 1, 50, 1),
    (300, 17, 64, 4),
    (900, 130, 4096, 3),
    (5000, 64, 7, 7),
    (1500, 70, 90, 9),
]
OFFSETS = [0, 77, 2**34 - 100, 2**61]
KEYS = torch.tensor([3, -(2**62)])


def reference(function, *args):
    with use_backend("reference"):
        return function(*args)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("d", "nnz"), [(1, 1), (30, 4), (2**31 - 1, 3)])
def test_rows_and_signs_are_the_reference_s(d, nnz, offset):
    got, expected = (f(sparse_sketch_entries, KEYS, d, nnz, offset, 300) for f in (lambda f, *a: f(*a), reference))
    for a, b, what in zip(got, expected, ("rows", "signs"), strict=True):
        assert_bitwise_equal(a, b, name=what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, dtype):
    m, n, d, nnz = shape
    a, rows = torch.randn(m, n).to(dtype), (d // 5, d - d // 4)
    place = KEYS, d, nnz, rows
    exact, same = (reference(sparse_sketch, x, *place, 2**34 - 100) for x in (a.double(), a))
    y = sparse_sketch(a, *place, 2**34 - 100)
    assert_close_to_float64(y, exact, same, tiny=1e-7 if dtype != torch.float64 else 1e-14)
    assert_bitwise_equal(sparse_sketch(a.T.contiguous().T, *place, 2**34 - 100), y, name="the other strides")
    g = torch.randn(2, rows[1] - rows[0], n).to(dtype)
    exact, same = (reference(sparse_sketch_adjoint, x, *place, m, 5) for x in (g.double(), g))
    assert_close_to_float64(
        sparse_sketch_adjoint(g, *place, m, 5), exact, same, tiny=1e-7 if dtype != torch.float64 else 1e-14
    )


def test_instruction_sets_agree_to_the_bit():
    module = _extension.module()
    a, g, best = torch.randn(3000, 70), torch.randn(2, 40, 70), module.cap_isa("avx512")
    csr = (torch.randn(3000, 70) * (torch.rand(3000, 70) < 0.1)).to_sparse_csr()
    place, results = (KEYS, 40, 4, (0, 40)), {}
    try:
        for isa in ("baseline", "avx2", "avx512"):
            if module.cap_isa(isa) == isa:
                results[isa] = (
                    sparse_sketch(a, *place),
                    sparse_sketch(a, KEYS, 40, 8, (0, 40)),
                    sparse_sketch(csr, *place),
                    sparse_sketch_adjoint(g, *place, 3000),
                    *sparse_sketch_entries(KEYS, 40, 4, 9, 500),
                )
    finally:
        module.cap_isa(best)
    for isa, result in results.items():
        for got, expected in zip(result, results["baseline"], strict=True):
            assert_bitwise_equal(got, expected, name=isa)


def test_nan_stays_in_its_column():
    a = torch.ones(50, 20)
    a[3, 7] = torch.nan
    y = sketch.SJLT(8, 50, key=KEYS[0]) @ a
    assert y[:, 7].isnan().sum() == 4
    assert not y[:, torch.arange(20) != 7].isnan().any()


@pytest.mark.parametrize(("crow", "col", "message"), [
    ([0, 2, 1], [0, 1], "crow must ascend from 0"),
    ([0, 1, 3], [0, 1], "crow must ascend from 0"),
    ([0, 1, 2], [0, 5], r"col must ascend within a row and lie in \[0, 5\)"),
    ([0, 2, 2], [1, 1], "col must ascend within a row"),
    ([0, 1, 2], [0, -1], "col must ascend within a row"),
])  # fmt: skip
def test_csr_that_points_elsewhere_is_refused(crow, col, message):
    with pytest.raises(ValueError, match=f"csr_sketch: {message}"):
        _backends.call("csr_sketch", torch.ones(2), torch.tensor(crow), torch.tensor(col), 5, KEYS, 4, 1, 0, 4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "first"), [((0, 50), 0), ((7, 31), 77)])
def test_one_vector_is_a_column_of_a_matrix(dtype, rows, first):
    """A vector has a kernel of its own, which adds in the same order: the same bits, strided and in blocks too."""
    keys, a = torch.tensor([1, 2, 3]), torch.randn(3000, 5).to(dtype)
    whole = sparse_sketch(a, keys, 50, 3, rows, first)
    for column in (a[:, 2:3], a[:, 2:3].contiguous()):
        assert_bitwise_equal(sparse_sketch(column, keys, 50, 3, rows, first), whole[:, :, 2:3].contiguous())


@pytest.mark.parametrize(("rows", "first"), [((0, 50), 0), ((7, 31), 77)])
def test_taking_nonzeros_by_number_changes_no_bit(rows, first):
    """Few columns are taken one by one, many number by number: a sum has the same terms in the same order."""
    keys, a = torch.tensor([1, 2, 3]), torch.randn(3000, 70)
    whole = sparse_sketch(a, keys, 50, 9, rows, first)
    assert_bitwise_equal(sparse_sketch(a[:, 40:60], keys, 50, 9, rows, first), whole[:, :, 40:60].contiguous())
