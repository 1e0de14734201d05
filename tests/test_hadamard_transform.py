"""hadamard_transform: equality with the matrix, every axis, sizes through one and two passes, derivatives, errors."""

from __future__ import annotations

import pytest
import randfuse
import torch
from randfuse import _extension, use_backend
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64
from scipy.linalg import hadamard

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def reference(*args):
    with use_backend("reference"):
        return randfuse.hadamard_transform(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 128, 1024])
def test_is_the_matrix(n, dtype):
    x = torch.randn(70, n).to(dtype)
    h = torch.from_numpy(hadamard(n)).double()
    expected = (x.double() @ h) * 0.3
    for y, what in (
        (randfuse.hadamard_transform(x, 0.3), "rows"),
        (randfuse.hadamard_transform(x.T, 0.3, 0).T, "columns"),
    ):
        assert_close_to_float64(
            y,
            expected,
            ((x.float() @ h.float()) * 0.3).to(dtype) if dtype != torch.float64 else expected,
            name=what,
            tiny=1e-6 if dtype != torch.float64 else 1e-14,
        )


@pytest.mark.parametrize(
    "shape", [(3, 64, 5), (2, 16, 200), (1, 4096, 17), (2, 8192, 3), (0, 8, 2), (2, 8, 0), (5, 1, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_axis_equals_reference(shape, dtype):
    x = torch.randn(shape).to(dtype)
    assert_close_to_float64(
        randfuse.hadamard_transform(x, 0.125, 1), reference(x.double(), 0.125, 1), reference(x, 0.125, 1), tiny=1e-7
    )
    turned = x.movedim(1, 0).contiguous().movedim(0, 1)
    assert_bitwise_equal(randfuse.hadamard_transform(turned, 0.125, 1), randfuse.hadamard_transform(x, 0.125, 1))


@pytest.mark.parametrize("n", [2**16, 2**17, 2**20])
def test_long_transforms(n):
    x = torch.randn(1, n)
    y = randfuse.hadamard_transform(x, n**-0.5)
    assert_close_to_float64(y, reference(x.double(), n**-0.5), reference(x, n**-0.5))
    half = randfuse.hadamard_transform(x.bfloat16(), n**-0.5)
    assert_close_to_float64(half, reference(x.bfloat16().double(), n**-0.5), reference(x.bfloat16(), n**-0.5))


def test_instruction_sets_and_threads_agree_to_the_bit():
    module = _extension.module()
    best, threads = module.cap_isa("avx512"), torch.get_num_threads()
    xs = [(torch.randn(9, 2048), 1), (torch.randn(3, 256, 40), 1), (torch.randn(2, 2**17), 1), (torch.randn(99, 4), 1)]
    expected = [randfuse.hadamard_transform(x, 0.7, dim) for x, dim in xs]
    try:
        for isa in ("baseline", "avx2", "avx512"):
            module.cap_isa(isa)
            for count in (1, 3):
                torch.set_num_threads(count)
                for (x, dim), y in zip(xs, expected, strict=True):
                    assert_bitwise_equal(randfuse.hadamard_transform(x, 0.7, dim), y, name=f"{isa}, {count} threads")
    finally:
        module.cap_isa(best)
        torch.set_num_threads(threads)


def test_integers_are_exact_and_it_inverts_itself():
    x = torch.randint(-100, 100, (4, 2**12)).float()
    y = randfuse.hadamard_transform(x)
    assert_bitwise_equal(randfuse.hadamard_transform(y, 2.0**-12), x)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_derivatives_vmap_compile(dim):
    x = torch.randn(4, 8, 2, dtype=torch.float64, requires_grad=True)
    f = lambda x: randfuse.hadamard_transform(x, 0.3, dim)  # noqa: E731
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(lambda x: f(x) ** 2, x)
    batch = torch.randn(4, 8, 3, 2)
    torch.testing.assert_close(
        torch.vmap(f, in_dims=2, out_dims=2)(batch), torch.stack([f(b) for b in batch.unbind(2)], 2)
    )
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.parametrize(("args", "error", "message"), [
    ((torch.ones(12),), ValueError, "x must have a power of two up to 2\\*\\*24 elements along dim, got 12"),
    ((torch.ones(0),), ValueError, "x must have a power of two"),
    ((torch.ones(8), 1.0, 1), IndexError, r"dim must be in \[-1, 0\], got 1"),
    ((torch.ones(8), 1.0, 0.0), TypeError, "dim must be an int, got float"),
    ((torch.ones(8), "1"), TypeError, "scale must be a number, got str"),
    ((torch.tensor(1.0),), ValueError, "x must have at least one dimension"),
    ((torch.ones(8, dtype=torch.int32),), TypeError, "x must be float32"),
])  # fmt: skip
def test_errors(args, error, message):
    with pytest.raises(error, match=f"hadamard_transform: {message}"):
        randfuse.hadamard_transform(*args)
