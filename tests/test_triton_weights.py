"""Triton's weight masks against the reference; like test_triton.py, which runs this file in the interpreter too."""

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import reference
from randfuse.testing import assert_bitwise_equal

pytest.importorskip("triton")
from test_triton import (
    CASES,
    DTYPES,
    INTERPRETING,
    close_to_exact,
    derivatives,
    on_device,
    op,
    pytestmark,  # noqa: F401  the interpreter's warnings
    wide,
)

KEYS = [torch.tensor(-3), torch.tensor([1, 2**40, -4])]


def place(key, device, row_offset=0, col_offset=0, p=0.3, p_tensor=None):
    return {
        "key": key.to(device), "p": p, "p_tensor": p_tensor, "row_offset": row_offset, "col_offset": col_offset
    }  # fmt: skip


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (0, 5), (3, 0), (3, 5), (3, 2, 40), (12, 1100)])
def test_mixout_equals_reference(device, dtype, shape):
    torch.manual_seed(0)
    w, a = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    for key in KEYS[: 1 if len(shape) < 2 else 2]:
        for row_offset, col_offset in ((0, 0), (2**32 - 12, 8), (1, 2**34 + 11)):
            stream = place(key, device, row_offset, col_offset)
            y = op("mixout")(w, a, **stream)
            close_to_exact(y, reference.mixout(*wide(w, a), **stream), reference.mixout(w, a, **stream), "mixout")
            if INTERPRETING:  # a compiler may contract a + (w - a) * scale
                assert_bitwise_equal(y, reference.mixout(w, a, **stream), name=f"mixout at {row_offset}, {col_offset}")


@on_device
def test_p_and_selection(device):
    """p = 0 is the weight itself, p = 1 the anchor; a replaced NaN does not spread."""
    w, a = torch.randn(8, 64, device=device), torch.randn(8, 64, device=device)
    for p in (0.0, 0.5, 1.0, float("nan"), 2.0):
        stream = place(KEYS[0], device, p=0.0, p_tensor=torch.tensor(p, device=device))
        assert_bitwise_equal(op("mixout")(w, a, **stream), reference.mixout(w, a, **stream), name=f"p = {p}")
    y = op("mixout")(torch.full_like(w, float("nan")), a, **place(KEYS[0], device))
    kept = op("dropout_mask")(KEYS[0].to(device), [8, 64], 0.3, None, 3, 0, 0, 0)
    assert_bitwise_equal(y.isnan(), kept, name="NaN where the weight is kept")
    assert_bitwise_equal(y[~kept], a[~kept], name="the anchor where it is not")


@on_device
def test_strides(device):
    base = torch.randn(60, 60, device=device)
    w, a, stream = base.T[:, 3:], base[:, :57], place(KEYS[0], device)
    assert_bitwise_equal(op("mixout")(w, a, **stream), reference.mixout(w, a, **stream), name="mixout")


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [s[:3] for s in CASES])
def test_linear_forms(device, dtype, sizes):
    torch.manual_seed(1)
    m, k, n = sizes
    x, w, a, b = (torch.randn(s, device=device).to(dtype) for s in ((m, k), (n, k), (n, k), (n,)))
    stream = place(KEYS[0], device, 3, 11)
    for bias in (b, None):
        exact = reference.dropconnect_linear(*wide(x, w, bias), **stream)
        plain = F.linear(x, reference.dropout(w, op=3, sample=0, **stream), bias)
        close_to_exact(op("dropconnect_linear")(x, w, bias, **stream), exact, plain, "dropconnect_linear")
        exact = reference.mixout_linear(*wide(x, w, a, bias), **stream)
        plain = F.linear(x, reference.mixout(w, a, **stream), bias)
        close_to_exact(op("mixout_linear")(x, w, a, bias, **stream), exact, plain, "mixout_linear")


@on_device
@pytest.mark.parametrize("name", ["dropconnect_linear", "mixout_linear"])
def test_derivatives(device, name):
    torch.manual_seed(2)
    x, w, a, b = (torch.randn(s, device=device) for s in ((6, 10), (7, 10), (7, 10), (7,)))
    inputs = (x, w, b) if name == "dropconnect_linear" else (x, w, a, b)
    run = lambda *t: getattr(randfuse, name)(*t, 0.4, key=KEYS[0].to(device), col_offset=3)  # noqa: E731
    ours, expected = (derivatives(backend, run, *inputs) for backend in ("triton", "reference"))
    for i, (y, e) in enumerate(zip(ours, expected, strict=True)):
        torch.testing.assert_close(y, e, rtol=2e-5, atol=1e-4, msg=lambda m, i=i: f"output {i}: {m}")
