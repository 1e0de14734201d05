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
ONE, HALF = torch.ones((), dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64)
SAMPLING = [
    (x(6, 9, grad=False), KEY, ONE, *[None] * 6, 0.0, None, None, "cdf", 0),
    (x(2, 3, 40, grad=False), torch.tensor([3, 4]), HALF, torch.tensor(7), HALF, HALF * 0.1, torch.tensor([4, 2]),
     torch.full((6, 2), -2, dtype=torch.int32), x(2, 3, 40, grad=False), 1.5, torch.tensor([5, 0]), 3, "race", 2),
]  # fmt: skip
SAMPLES = {
    "categorical_sample": SAMPLING,
    "categorical_sample_with_stats": SAMPLING,
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
    "linear_dropout": [
        (x(4, 9), x(5, 9), x(5), x(4, 5), "gelu", True, *STREAM),
        (x(4, 9, grad=False), x(9, 5, grad=False).t(), None, None, "none", False, *TENSOR_P),
    ],
    "act_dropout": [(x(4, 9), x(4, 9), "silu", *STREAM), (turned(9, 4), None, "relu", *TENSOR_P)],
    "act_dropout_grad": [(x(4, 9), x(4, 9), "silu", *STREAM), (turned(9, 4), x(4, 9), "relu", *TENSOR_P)],
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
    ("categorical_sample", 0, torch.ones(6, 9, dtype=torch.int32), "logits must be float32"),
    ("categorical_sample", 0, torch.ones(6, 0), "logits must have shape"),
    ("categorical_sample", 1, torch.zeros(4, dtype=torch.int64), "key must have a length that divides the 6 rows"),
    ("categorical_sample", 2, -ONE, "temperature must be 0 or in"),
    ("categorical_sample", 2, torch.ones(5), r"temperature must have shape \(\) or \(rows,\)"),
    ("categorical_sample", 3, torch.tensor(0), "top_k must be at least 1, got 0"),
    ("categorical_sample", 4, torch.tensor(1.5), r"top_p must be in \[0, 1\], got 1.5"),
    ("categorical_sample", 5, torch.tensor(-1.0), r"min_p must be in \[0, 1\], got -1"),
    ("categorical_sample", 6, torch.tensor([9]), r"exclude must be in \[0, 9\), got 9"),
    ("categorical_sample", 7, torch.ones(6, 2, dtype=torch.int32), "bitmask must have shape"),
    ("categorical_sample", 7, torch.ones(6, 1), "bitmask must be int32"),
    ("categorical_sample", 8, x(6, 8, grad=False), "uncond_logits must have shape"),
    ("categorical_sample", 9, float("nan"), "cfg_scale must be finite"),
    ("categorical_sample", 10, torch.tensor([-1]), r"rows must be in \[0, 6\), got -1"),
    ("categorical_sample", 11, 0, r"num_samples must be in \[1, 2\*\*32\), got 0"),
    ("categorical_sample", 12, "best", "method must be 'cdf' or 'race', got 'best'"),
    ("categorical_sample", 13, -1, "row_offset must be in"),
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
])  # fmt: skip
def test_raw_ops_guard_memory(name, position, value, message):
    """Called directly, an op refuses what the public function would have refused."""
    arguments = list(SAMPLES[name][0])
    arguments[position] = value
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {message}"):
        _registry.overloads("randfuse")[name](*arguments)


@pytest.mark.parametrize("name", [n for n in SAMPLES if n != "dropout_mask"])
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
