"""Triton's sketches against the reference; like test_triton.py, which runs this file in the interpreter too."""

import pytest
import torch
from randfuse import reference, use_backend
from randfuse.ops.dense_sketch import dense_sketch
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

pytest.importorskip("triton")
from test_triton import (
    DTYPES,
    on_device,
    op,
    pytestmark,  # noqa: F401  the interpreter's warnings
)

KEYS = torch.tensor([3, -(2**62)])
PLACES = [  # row_begin, row_end, col_offset, cols
    (0, 3, 0, 300),
    (5, 7, 77, 1),
    (2**32 - 2, 2**32, 2**39 - 50, 200),
    (9, 9, 0, 5),
    (0, 20, 2**61, 129),
]
FAMILIES = ["gaussian", "rademacher"]


@on_device
@pytest.mark.parametrize("place", PLACES)
def test_entries_equal_reference(device, place):
    keys = KEYS.to(device)
    signs = op("dense_sketch_entries")(keys, "rademacher", *place)
    assert_bitwise_equal(signs, reference.dense_sketch_entries(keys, "rademacher", *place))
    z = op("dense_sketch_entries")(keys, "gaussian", *place)
    exact = reference.dense_sketch_entries(keys, "gaussian", *place)
    off = (z.view(torch.int32).long() - exact.view(torch.int32).long()).abs()  # units of the last place: signs agree
    assert off.numel() == 0 or off.max() <= 2, f"normals must be within 2 ulp, got {off.max()}"


@on_device
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((300, 20, 30), dtype) for dtype in DTYPES]
    + [(shape, torch.float32) for shape in ((0, 3, 5), (1, 1, 1), (2100, 2, 3))],  # the last: sums of two parts
)
def test_products_equal_reference(device, shape, dtype, family):
    torch.manual_seed(0)
    m, n, d = shape
    keys, place = KEYS.to(device), (family, d, d // 5, d, 2**34 + 77)
    a, g = torch.randn(m, n, device=device).to(dtype), torch.randn(2, d - d // 5, n, device=device).to(dtype)
    for name, x, last in (("dense_sketch", a, ()), ("dense_sketch_adjoint", g, (m,))):
        exact, same = (getattr(reference, name)(t, keys, *place, *last) for t in (x.double(), x))
        # tiny: two ulp of an entry and the rounding of the scale, which sums of one product show
        assert_close_to_float64(op(name)(x, keys, *place, *last), exact, same, name=name, tiny=5e-7)


@on_device
def test_signed_float32_is_exact(device):
    """One column at a time: ±a/√d to the last bit, however many bits a has; infinity and NaN stay what they are."""
    a = torch.tensor([1 / 3, 2**24 - 1, 1e-30, 3.4028234e38, float("inf"), float("nan")], device=device)[None]
    y = op("dense_sketch")(a, KEYS[:1].to(device), "rademacher", 4, 0, 4, 5)[0]
    s = reference.dense_sketch_entries(KEYS[:1].to(device), "rademacher", 0, 4, 5, 1)[0]
    assert_bitwise_equal(y, s * a * 0.5)


@on_device
@pytest.mark.parametrize("family", FAMILIES)
def test_strides_and_slices(device, family):
    """Data down its columns is read as it lies; a slice of the operator is the slice of its product."""
    x, keys = torch.randn(140, 6, device=device), KEYS.to(device)
    y = op("dense_sketch")(x, keys, family, 20, 0, 20, 200)
    for other in (x.T.contiguous().T, torch.stack((x, x), 2)[..., 1]):
        assert_bitwise_equal(op("dense_sketch")(other, keys, family, 20, 0, 20, 200), y)
    assert_bitwise_equal(op("dense_sketch")(x, keys, family, 20, 7, 11, 200), y[:, 7:11])


@on_device
def test_derivatives_are_the_adjoint_s(device):
    x, keys = torch.randn(40, 3, device=device, requires_grad=True), KEYS.to(device)
    grads = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            y = dense_sketch(x, keys, "rademacher", 6, (1, 6))
            grads += torch.autograd.grad((y * torch.arange(3.0, device=device)).sum(), x)
    torch.testing.assert_close(*grads)


OPERATORS = [  # d, nnz, row_begin, row_end, col_offset
    (37, 1, 0, 37, 0),
    (100, 4, 0, 100, 77),
    (61, 3, 5, 50, 2**34 - 130),
    (20, 7, 3, 17, 2**61 + 3),
    (1, 1, 0, 1, 5),
]


@on_device
@pytest.mark.parametrize("place", OPERATORS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (300, 20)])
def test_sparse_equals_reference(device, shape, place):
    torch.manual_seed(0)
    (m, n), (d, nnz, begin, end, offset), keys = shape, place, KEYS.to(device)
    ours, expected = (
        f(keys, d, nnz, offset, m) for f in (op("sparse_sketch_entries"), reference.sparse_sketch_entries)
    )
    assert_bitwise_equal(ours[0], expected[0], name="rows")
    assert_bitwise_equal(ours[1], expected[1], name="signs")
    a, g = torch.randn(m, n, device=device), torch.randn(2, end - begin, n, device=device)
    for name, x, last in (("sparse_sketch", a, ()), ("sparse_sketch_adjoint", g, (m,))):
        exact, same = (getattr(reference, name)(t, keys, *place, *last) for t in (x.double(), x))
        assert_close_to_float64(op(name)(x, keys, *place, *last), exact, same, name=name, tiny=2e-7)


@on_device
def test_sparse_dtypes_parts_and_strides(device):
    torch.manual_seed(0)
    place, keys = (50, 4, 0, 50, 7), KEYS[:1].to(device)
    for x in (torch.randn(140, 6).half(), torch.randn(140, 6).bfloat16(), torch.randn(2100, 2)):
        x = x.to(device)
        y = op("sparse_sketch")(x, keys, *place)
        exact, same = (reference.sparse_sketch(t, keys, *place) for t in (x.double(), x))
        assert_close_to_float64(y, exact, same, name=str(x.dtype), tiny=2e-7)
        assert_bitwise_equal(op("sparse_sketch")(x.T.contiguous().T, keys, *place), y, name="down the columns")


@on_device
@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"family": "cauchy"}, ValueError, "family must be gaussian or rademacher, got 'cauchy'"),
    ({"a": torch.ones(3)}, ValueError, r"a must have shape \(m, n\), got \(3,\)"),
    ({"a": torch.ones(3, 2, dtype=torch.float64)}, TypeError, "a must be float32, float16 or bfloat16"),
    ({"key": torch.tensor(1)}, ValueError, r"key must have shape \(K,\) with K > 0, got \(\)"),
    ({"key": torch.ones(1)}, TypeError, "key must be int64, got torch.float32"),
    ({"row_end": 9}, ValueError, "rows must satisfy 0 <= row_begin <= row_end <= d=8, got 1 and 9"),
    ({"col_offset": 2**62}, ValueError, r"col_offset must be in \[0, 2\*\*62 - 3\], got 4611686018427387904"),
    ({"d": 2**31}, ValueError, r"d must be in \[1, 2\*\*31\), got 2147483648"),
])  # fmt: skip
def test_errors(device, changes, error, message):
    good = {"a": torch.ones(3, 2), "key": KEYS, "family": "gaussian", "d": 8, "row_begin": 1, "row_end": 7}
    good["col_offset"] = 0
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (good | changes).items()}
    with pytest.raises(error, match=f"dense_sketch: {message}"):
        op("dense_sketch")(*arguments.values())
