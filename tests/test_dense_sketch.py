"""Entries of the dense operators: bits, ulps and moments. Products are tested in test_sketch.py."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
from randfuse import _extension, use_backend
from randfuse.ops.dense_sketch import dense_sketch, dense_sketch_adjoint, dense_sketch_entries
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

KEYS = torch.tensor([3, -(2**62)])
PLACES = [
    ((0, 3), 0, 300),
    ((5, 7), 77, 1),
    ((2**32 - 2, 2**32), 2**39 - 50, 200),
    ((9, 9), 0, 5),
    ((0, 2), 2**61, 129),
]


def reference(function, *args):
    with use_backend("reference"):
        return function(*args)


@pytest.mark.parametrize("place", PLACES)
def test_entries_are_the_reference_s(place):
    signs = dense_sketch_entries(KEYS, "rademacher", *place)
    assert_bitwise_equal(signs, reference(dense_sketch_entries, KEYS, "rademacher", *place))
    normals, exact = (
        dense_sketch_entries(KEYS, "gaussian", *place),
        reference(dense_sketch_entries, KEYS, "gaussian", *place),
    )
    assert ulps(normals, exact) <= 2


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in units of the last place; a and b have the same signs."""
    return int((a.view(torch.int32).long() - b.view(torch.int32).long()).abs().max()) if a.numel() else 0


def test_normals_are_within_two_ulps():
    place = KEYS[:1], "gaussian", (0, 64), 0, 4096
    assert ulps(dense_sketch_entries(*place), reference(dense_sketch_entries, *place)) <= 2


def test_instruction_sets_agree_to_the_bit():
    module = _extension.module()
    best, results = module.cap_isa("avx512"), {}
    try:
        for isa in ("baseline", "avx2", "avx512"):
            if module.cap_isa(isa) == isa:
                results[isa] = [dense_sketch_entries(KEYS, f, (3, 9), 5, 4000) for f in ("gaussian", "rademacher")]
    finally:
        module.cap_isa(best)
    for isa, (normals, signs) in results.items():
        assert_bitwise_equal(normals, results["baseline"][0], name=f"normals, {isa}")
        assert_bitwise_equal(signs, results["baseline"][1], name=f"signs, {isa}")


def test_normals_are_normal():
    """4·10⁶ normals; 9 z-tests at |z| < 5.5 (false alarm 3e-7): four moments, tails beyond 3, 4 and 5, neighbours."""
    z = dense_sketch_entries(KEYS[:1], "gaussian", (0, 64), 0, 65536)[0].double()
    n = z.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        score = (float(z.pow(power).mean()) - mean) / math.sqrt(variance / n)
        assert abs(score) < 5.5, f"moment {power}: z = {score:.1f}"
    for bound in (3, 4, 5):
        p = math.erfc(bound / math.sqrt(2))
        score = (int((z.abs() > bound).sum()) - n * p) / math.sqrt(n * p)
        assert abs(score) < 5.5, f"beyond {bound}: z = {score:.1f}"
    for distance in (1, 16):  # the other one of a pair, which shares the radius
        a, b = z[:, :-distance].square() - 1, z[:, distance:].square() - 1
        score = float((a * b).mean()) * math.sqrt(a.numel()) / 2
        assert abs(score) < 5.5, f"squares at distance {distance}: z = {score:.1f}"
    assert z.abs().max() > 4.5
    # Negative control: uniforms of 16 bits have no tail beyond √(2·16·ln 2) = 4.71.
    u = (z.abs() > 4.71).sum()
    assert u > 0


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (2500, 20, 100), (300, 33, 7)])
def test_products_equal_reference(shape, dtype, family):
    m, n, d = shape
    a, rows = torch.randn(m, n).to(dtype), (d // 5, d)
    place = KEYS, family, d, rows
    exact, same = (reference(dense_sketch, x, *place, 77) for x in (a.double(), a))
    tiny = 1e-6  # entries may differ by 2 ulp of float32
    assert_close_to_float64(dense_sketch(a, *place, 77), exact, same, tiny=tiny, factor=4)
    g = torch.randn(2, rows[1] - rows[0], n).to(dtype)
    exact, same = (reference(dense_sketch_adjoint, x, *place, m, 77) for x in (g.double(), g))
    assert_close_to_float64(dense_sketch_adjoint(g, *place, m, 77), exact, same, tiny=tiny, factor=4)


def test_memory_does_not_grow_with_m():
    """2^14 columns of an implicit 64 × 2^40 operator: a stored one would take 256 TiB."""
    s = randfuse.sketch.Gaussian(64, 2**40, key=randfuse.key(1))
    y = s.apply(torch.ones(2**14), offset=2**39)
    assert y.shape == (64,)
    assert y.std() > 0
