"""Every registered op: opcheck, the grid of files, equal schemas in the reference."""

from __future__ import annotations

import inspect

import pytest
import randfuse
import torch
from randfuse import _extension, _registry, reference

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

KEY = torch.tensor(5)


def x(*shape, grad=True):
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def turned(*shape):
    """A leaf of that shape whose last stride is not one."""
    return x(*shape).t().detach().requires_grad_()


STREAM = (KEY, 0.4, None, 1, 2)
TENSOR_P = (torch.tensor([3, 4]), 0.0, torch.tensor(0.4, dtype=torch.float64), 0, 0)
KEYS = torch.tensor([3, 4])
SAMPLES = {
    "csr_sketch": [
        (
            torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
            torch.tensor([0, 2, 2, 3]),
            torch.tensor([0, 3, 1]),
            *(5, KEYS, 8, 2, 1, 8, 4),
        )
    ],
    "dense_sketch": [
        (x(9, 4), KEYS, "gaussian", 8, 2, 7, 130),
        (turned(4, 9), KEYS[:1], "rademacher", 8, 0, 8, 0),
        (x(0, 4), KEYS, "gaussian", 8, 0, 8, 0),
    ],
    "dense_sketch_adjoint": [
        (x(2, 5, 4), KEYS, "gaussian", 8, 2, 7, 130, 9),
        (x(1, 8, 4, grad=False), KEYS[:1], "rademacher", 8, 0, 8, 0, 9),
    ],
    "dense_sketch_entries": [(KEYS, "gaussian", 2, 7, 130, 9), (KEYS, "rademacher", 2, 7, 130, 9)],
    "distinct_rows": [(KEYS, 1, 40, 7), (KEYS, 0, 3, 0)],
    "dropout": [
        (x(4, 9), *STREAM[:3], 1, 0, 1, 2),
        (turned(9, 4), *STREAM[:3], 2, 0, 0, 0),
        (x(0, 9), *STREAM[:3], 1, 0, 0, 0),
        (x(4, 3, 9, grad=False), *TENSOR_P[:3], 1, 3, 0, 0),
    ],
    "dropout_mask": [(KEY, [4, 9], 0.4, None, 1, 0, 1, 2), (KEY, [0, 9], 0.4, None, 1, 0, 1, 2)],
    "dropout_linear": [
        (x(4, 9), x(5, 9), x(5), *STREAM),
        (x(2, 2, 9, grad=False), turned(9, 100), None, *TENSOR_P),
        (x(0, 9), x(5, 9), None, *STREAM),
    ],
    "dropout_linear_dgrad": [(x(4, 5), x(5, 9), *STREAM), (x(2, 2, 5), turned(9, 5), *TENSOR_P)],
    "dropout_linear_wgrad": [(x(4, 5), x(4, 9), *STREAM), (turned(5, 4), turned(9, 4), *TENSOR_P)],
    "hadamard_transform": [(x(4, 8), 0.5, 1), (turned(9, 4), 0.5, 0), (x(2, 8, 3), 0.5, 1)],
    "linear_dropout": [
        (x(4, 9), x(5, 9), x(5), x(4, 5), "gelu", True, *STREAM),
        (x(4, 9, grad=False), x(9, 5, grad=False).t(), None, None, "none", False, *TENSOR_P),
    ],
    "act_dropout": [(x(4, 9), x(4, 9), "silu", *STREAM), (turned(9, 4), None, "relu", *TENSOR_P)],
    "act_dropout_grad": [(x(4, 9), x(4, 9), "silu", *STREAM), (turned(9, 4), x(4, 9), "relu", *TENSOR_P)],
    "sparse_sketch": [
        (x(9, 4), KEYS, 8, 2, 2, 7, 130),
        (turned(4, 9), KEYS[:1], 8, 1, 0, 8, 0),
        (x(0, 4), KEYS, 8, 2, 0, 8, 0),
    ],
    "sparse_sketch_adjoint": [
        (x(2, 5, 4), KEYS, 8, 2, 2, 7, 130, 9),
        (x(1, 8, 4, grad=False), KEYS[:1], 8, 1, 0, 8, 0, 9),
    ],
    "sparse_sketch_entries": [(KEYS, 8, 2, 130, 9)],
}


def registered():
    return sorted({s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("randfuse::")})


def test_no_op_is_forgotten():
    assert registered() == sorted(SAMPLES) == sorted(_registry.overloads("randfuse")) == sorted(reference.FUNCTIONS)


@pytest.mark.parametrize(("name", "index"), [(n, i) for n, samples in SAMPLES.items() for i in range(len(samples))])
def test_opcheck(name, index):
    torch.library.opcheck(_registry.overloads("randfuse")[name], SAMPLES[name][index])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "index"), [(n, i) for n, samples in SAMPLES.items() for i in range(len(samples))])
def test_opcheck_on_the_gpu(name, index):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"randfuse::{name}", "CUDA"):
        pytest.skip("has no CUDA kernel")

    def move(a):
        if not isinstance(a, torch.Tensor):
            return a
        grad, a = a.requires_grad, a.detach().to("cuda")
        return a.float().requires_grad_(grad) if a.is_floating_point() and a.dim() else a

    torch.library.opcheck(_registry.overloads("randfuse")[name], tuple(map(move, SAMPLES[name][index])))


@pytest.mark.parametrize("name", SAMPLES)
def test_reference_has_the_signature_of_the_schema(name):
    schema = _registry.overloads("randfuse")[name]._schema
    assert list(inspect.signature(reference.FUNCTIONS[name]).parameters) == [a.name for a in schema.arguments]


@pytest.mark.parametrize("name", SAMPLES)
def test_reference_agrees_on_the_samples(name):
    for sample in SAMPLES[name]:
        with torch.no_grad():
            got, expected = _registry.overloads("randfuse")[name](*sample), reference.FUNCTIONS[name](*sample)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("name", "position", "value", "message"), [
    ("dropout", 0, torch.ones(4, 9, dtype=torch.int32), "x must be float32"),
    ("dropout", 1, torch.tensor(1.0), "key must be int64"),
    ("dropout", 1, torch.tensor([1, 2, 3]), "key must have a length that divides the 4 rows, got 3"),
    ("dropout", 2, 1.5, r"p must be in \[0, 1\], got 1.5"),
    ("dropout", 3, torch.ones(2), "p must be a number or a 0-d floating tensor"),
    ("dropout", 5, -1, "sample must be in"),
    ("dropout", 6, 2**32, "row_offset must be in"),
    ("dropout_mask", 1, [4], "shape must be two sizes"),
    ("dropout_mask", 1, [-4, 2], "shape must be two sizes"),
    ("dropout_linear", 1, torch.ones(5, 8, dtype=torch.float64), r"weight must have shape \(N, K=9\)"),
    ("dropout_linear", 1, torch.ones(5, 9), "weight must be torch.float64, got torch.float32"),
    ("dropout_linear", 2, torch.ones(4, dtype=torch.float64), r"bias must have shape \(N,\)"),
    ("dropout_linear_dgrad", 1, torch.ones(4, 9, dtype=torch.float64), r"weight must have shape \(N=5, K\)"),
    ("dropout_linear_wgrad", 1, x(3, 9), r"x must have shape \(…, K\) = \[4, 9\], got \[3, 9\]"),
    ("linear_dropout", 4, "tanh", "activation must be one of none, relu, gelu, silu, got 'tanh'"),
    ("linear_dropout", 3, torch.ones(4, 4, dtype=torch.float64), "residual must have shape"),
    ("act_dropout", 1, torch.ones(4, 8, dtype=torch.float64), "residual must have shape"),
    ("act_dropout_grad", 1, torch.ones(4, 8, dtype=torch.float64), r"z must have shape \[4, 9\]"),
    ("csr_sketch", 1, torch.tensor([0, 2, 1, 3]), "crow must ascend"),
    ("csr_sketch", 2, torch.tensor([0, 5, 1]), r"col must ascend within a row and lie in \[0, 5\)"),
    ("dense_sketch", 0, x(9), r"a must have shape \(m, n\), got \[9\]"),
    ("dense_sketch", 2, "cauchy", "family must be gaussian or rademacher, got 'cauchy'"),
    ("dense_sketch", 5, 9, "rows must satisfy"),
    ("dense_sketch_adjoint", 0, x(2, 6, 4), r"y must have shape \(K, rows, n\) = \(2, 5, n\), got \[2, 6, 4\]"),
    ("dense_sketch_entries", 4, -1, "col_offset must be in"),
    ("distinct_rows", 3, 41, r"count must be in \[0, 40\], got 41"),
    ("hadamard_transform", 0, x(4, 7), "x must have a power of two up to 2..24 elements along dim, got 7"),
    ("hadamard_transform", 2, 2, r"dim must be in \[0, 2\), got 2"),
    ("sparse_sketch", 1, torch.tensor(3), r"key must have shape \(K,\) with K > 0"),
    ("sparse_sketch", 2, 0, r"d must be in \[1, 2\*\*31\), got 0"),
    ("sparse_sketch", 3, 9, r"nnz must be in \[1, min\(d, 1024\)\], got 9"),
    ("sparse_sketch", 6, 2**62, "col_offset must be in"),
    ("sparse_sketch_adjoint", 0, x(2, 6, 4), r"y must have shape \(K, rows, n\)"),
    ("sparse_sketch_entries", 0, torch.ones(2), "key must be int64"),
])  # fmt: skip
def test_raw_ops_guard_memory(name, position, value, message):
    """Called directly, an op refuses what the public function would have refused."""
    arguments = list(SAMPLES[name][0])
    arguments[position] = value
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {message}"):
        _registry.overloads("randfuse")[name](*arguments)


@pytest.mark.parametrize("name", [n for n in SAMPLES if n != "dropout_mask" and not n.endswith("_entries")])
def test_raw_ops_under_autocast_keep_their_dtype(name):
    """The library's products inside an op are not cast a second time."""

    def single(a):
        return a.detach().float() if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dim() else a

    for sample in SAMPLES[name]:
        arguments = tuple(map(single, sample))
        expected = _registry.overloads("randfuse")[name](*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            got = _registry.overloads("randfuse")[name](*arguments)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_import_surface():
    assert set(randfuse.__all__) <= set(dir(randfuse))
