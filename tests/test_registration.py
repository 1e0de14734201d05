"""Every registered op: opcheck, the grid of files, equal schemas in the reference."""

from __future__ import annotations

import inspect

import pytest
import randfuse
import torch
from randfuse import _extension, _registry, reference

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

KEY = torch.tensor(5)


GENERATOR = torch.Generator().manual_seed(0)


def x(*shape, grad=True):
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR).requires_grad_(grad)


def turned(*shape):
    """A leaf of that shape whose last stride is not one."""
    return x(*shape).t().detach().requires_grad_()


def fixed(*shapes):
    return [x(*shape, grad=False) for shape in shapes]


STREAM = (KEY, 0.4, None, 1, 2)
SAMPLED = (KEY, 0.4, None, 3, 1, 2)
TENSOR_P = (torch.tensor([3, 4]), 0.0, torch.tensor(0.4, dtype=torch.float64), 0, 0)
KEPT = torch.tensor([[[0, 2, 3]]])  # of three blocks, the last place empty
COUNTED, COUNTED_P = (STREAM[0], 2, *STREAM[1:]), (TENSOR_P[0], 2, *TENSOR_P[1:])  # with a number of samples
LABELS = torch.tensor([0, 4, -100, 2])
KEYS = torch.tensor([3, 4])
ONE, HALF = torch.ones((), dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64)
SAMPLING = [
    (x(6, 9, grad=False), KEY, ONE, *[None] * 6, 0.0, None, None, "cdf", 0),
    (x(2, 3, 40, grad=False), torch.tensor([3, 4]), HALF, torch.tensor(7), HALF, HALF * 0.1, torch.tensor([4, 2]),
     torch.full((6, 2), -2, dtype=torch.int32), x(2, 3, 40, grad=False), 1.5, torch.tensor([5, 0]), 3, "race", 2),
]  # fmt: skip
DRAFTS = torch.tensor([[1, 2], [39, 0], [5, -1], [40, 3]])
DRAWN, PARENTS = torch.tensor([[1, 2, 7], [0, 3, 8], [5, 0, 9], [3, 0, 1]]), torch.tensor([[0, 1], [0, 0]] * 2)
EMPTY_TREE = torch.empty(4, 0, dtype=torch.int64), torch.empty(4, 0, dtype=torch.int64)  # drafts, parents
SAMPLES = {
    "dropconnect_linear": [
        (x(4, 9), x(5, 9), x(5), *STREAM),
        (x(2, 2, 9, grad=False), turned(9, 6), None, *TENSOR_P),
        (x(0, 9), x(5, 9), None, *STREAM),
    ],
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
    "categorical_race": [(*s[:3], *s[6:12], s[13], 8) for s in SAMPLING],
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
    "hadamard_transform": [(x(4, 8), 0.5, 1), (turned(9, 4), 0.5, 0), (x(2, 8, 3), 0.5, 1)],
    "linear_dropout": [
        (x(4, 9), x(5, 9), x(5), x(4, 5), "gelu", True, *STREAM),
        (x(4, 9, grad=False), x(9, 5, grad=False).t(), None, None, "none", False, *TENSOR_P),
    ],
    "mixout": [(x(4, 9), x(4, 9), *STREAM), (turned(9, 4), x(4, 9, grad=False), *TENSOR_P)],
    "mixout_linear": [
        (x(4, 9), x(5, 9), x(5, 9), x(5), *STREAM),
        (x(2, 2, 9, grad=False), turned(9, 6), x(6, 9, grad=False), None, *TENSOR_P),
    ],
    "multi_sample_cross_entropy": [
        (x(4, 9), x(5, 9), x(5), LABELS, None, *COUNTED[:4], -100, 0.1, 1, 2),
        (
            x(2, 2, 9, grad=False),
            turned(9, 5),
            None,
            x(2, 2, 5, grad=False),
            x(5, grad=False),
            *COUNTED_P[:4],
            -1,
            0.0,
            0,
            0,
        ),
    ],
    "multi_sample_cross_entropy_grad": [  # differentiated once only
        (*fixed((4,), (2, 4), (4, 9), (5, 9), (5,)), LABELS, None, *STREAM[:3], -100, 0.1, 1, 2, [True, True, True]),
        (
            *fixed((4,), (2, 4), (4, 9), (70, 9)),
            None,
            LABELS,
            None,
            *TENSOR_P[:3],
            -100,
            0.0,
            0,
            0,
            [True, False, False],
        ),
    ],
    "multi_sample_cross_entropy_with_grads": [
        (fixed(())[0], x(4, 9), x(5, 9), x(5), LABELS, None, *COUNTED[:4], -100, 0.1, 1, 2, [True, True, True]),
        (
            fixed(())[0],
            x(2, 2, 9, grad=False),
            turned(9, 70),
            None,
            x(2, 2, 70, grad=False),
            x(70, grad=False),
            *COUNTED_P[:4],
            -1,
            0.0,
            0,
            0,
            [False, True, False],
        ),
    ],
    "multi_sample_linear": [
        (x(4, 9), x(5, 9), x(5), *COUNTED),
        (x(2, 2, 9, grad=False), turned(9, 100), None, *COUNTED_P),
        (x(4, 9), x(2, 5, 9), x(2, 5), *COUNTED),
        (x(0, 9), x(5, 9), None, *COUNTED),
    ],
    "multi_sample_linear_dgrad": [(x(2, 4, 5), x(5, 9), *STREAM), (x(2, 2, 2, 5), x(2, 5, 9), *TENSOR_P)],
    "multi_sample_linear_wgrad": [(x(2, 4, 5), x(4, 9), True, *STREAM), (x(2, 4, 5), turned(9, 4), False, *TENSOR_P)],
    "multi_sample_scale": [(x(4, 9), *COUNTED), (turned(9, 4), *COUNTED_P), (x(0, 9), *COUNTED)],
    "act_dropout": [(x(4, 9), x(4, 9), "silu", *STREAM), (turned(9, 4), None, "relu", *TENSOR_P)],
    "block_dropout_linear": [
        (x(1, 4, 70), x(5, 70), x(5), KEPT, 32, 1.5),
        (x(2, 300, 9, grad=False), turned(9, 10), None, torch.zeros(2, 2, 1, dtype=torch.int64), 32, 1.5),
        (x(1, 0, 70), x(5, 70), None, torch.zeros(1, 0, 2, dtype=torch.int64), 32, 1.5),
    ],
    "block_dropout_linear_dgrad": [(x(1, 4, 5), x(5, 70), KEPT, 32, 1.5), (x(1, 4, 5), turned(70, 5), KEPT, 32, 1.5)],
    "block_dropout_linear_wgrad": [(x(1, 4, 5), x(1, 4, 70), KEPT, 32, 1.5)],
    "kept_blocks": [(KEY, 3, 7, 2, 5, 1, 2), (torch.tensor([3, 4]), 3, 7, 7, 0, 0, 0), (KEY, 0, 0, 0, 0, 0, 0)],
    "act_dropout_grad": [(x(4, 9), x(4, 9), "silu", *STREAM), (turned(9, 4), x(4, 9), "relu", *TENSOR_P)],
    "lora_linear": [
        (x(4, 9), x(5, 9), x(5), x(2, 9), x(5, 2), 1.5, *SAMPLED),
        (x(2, 2, 9, grad=False), turned(9, 5), None, turned(9, 2), turned(2, 5), 2.0, *TENSOR_P[:3], 0, 0, 0),
    ],
    "lora_linear_down": [(x(4, 9), x(2, 9), *SAMPLED), (turned(9, 4), turned(9, 2), *TENSOR_P[:3], 0, 0, 0)],
    "lora_linear_dgrad": [(x(4, 5), x(5, 9), x(4, 2), x(2, 9), *SAMPLED)],
    "lora_linear_wgrad": [(x(4, 2), x(4, 9), *SAMPLED), (turned(2, 4), turned(9, 4), *TENSOR_P[:3], 0, 0, 0)],
    "random_words": [
        (
            torch.arange(6).reshape(2, 3),
            torch.tensor([[0, 1, 2**40], [-1, 5, 5]]),
            torch.tensor([[3], [2**32 - 1]]).expand(2, 3),
            7,
        ),
        (KEYS[:0], KEYS[:0], KEYS[:0], 2**32 - 1),
    ],
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
    "speculative_accept": [
        (
            x(4, 3, 40, grad=False),
            DRAFTS,
            KEY,
            x(4, 2, 40, grad=False),
            None,
            None,
            ONE,
            *[None] * 5,
            "token",
            0.1,
            0.3,
            *[None] * 4,
        ),
        (
            x(9, 40, grad=False),
            DRAFTS,
            torch.tensor([3, 4]),
            x(4, 2, 7, grad=False),
            None,
            torch.tensor([0, 3, 5, 6, 9]),
            ONE,
            HALF[:4],
            None,
            None,
            None,
            torch.full((9, 2), -2, dtype=torch.int32),
            "block",
            0.1,
            0.3,
            x(4, 2, grad=False),
            x(9, grad=False),
            torch.arange(7),
            torch.arange(4),
        ),
        (
            x(4, 3, 40, grad=False),
            DRAFTS,
            KEY,
            None,
            torch.tensor([2, 0, 1, 2]),
            None,
            HALF[:4],
            None,
            torch.tensor(7),
            HALF[:4],
            HALF[:4] * 0.1,
            None,
            "match",
            0.1,
            0.3,
            *[None] * 4,
        ),
    ],
    "accept_path": [
        (DRAWN, *fixed((4, 3), (4, 3)), DRAFTS, PARENTS, 40),
        (DRAWN[:, :1], x(4, 1, grad=False).float(), torch.full((4, 1), -torch.inf), *EMPTY_TREE, 40),
    ],
    "tree_keys": [
        (KEY, None, PARENTS),
        (torch.arange(4), torch.arange(4) * 2**40, PARENTS),
        (KEY, None, EMPTY_TREE[0]),
    ],
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
        normals = name.startswith("dense_sketch")  # which may differ by 2 ulp of float32 (docs/streams.md)
        torch.testing.assert_close(got, expected, **{"rtol": 0, "atol": 1e-6} if normals else {})


@pytest.mark.parametrize(("name", "position", "value", "message"), [
    ("dropconnect_linear", 1, torch.ones(5, 8, dtype=torch.float64), r"weight must have shape \(N, K=9\)"),
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
    ("categorical_race", 3, torch.tensor([2**34]), r"exclude must be in \[0, 17179869184\), got 17179869184"),
    ("categorical_race", 10, 6, r"col_offset must be a multiple of 4 in \[0, 2\*\*34 - V\], got 6"),
    ("categorical_race", 10, 2**34 - 8, "col_offset must be a multiple of 4"),
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
    ("multi_sample_cross_entropy", 3, torch.tensor([0, 5, 1, 1]), r"target must be in \[0, C=5\) or .*, got 5"),
    ("multi_sample_cross_entropy", 3, torch.ones(4, 4), r"target must have shape \(…, C\) = \[4, 5\], got \[4, 4\]"),
    ("multi_sample_cross_entropy", 4, torch.ones(4), r"ce_weight must have shape \(C,\) = \(5\), got \[4\]"),
    ("multi_sample_cross_entropy", 6, 0, "num_samples must be in"),
    ("multi_sample_cross_entropy_grad", 1, x(2, 3), "grad and logsumexp must have shapes"),
    ("multi_sample_cross_entropy_with_grads", 0, x(1), "divisor must be a 0-d tensor of the type of sums"),
    ("multi_sample_linear", 1, x(3, 5, 9), r"weight must have shape \(N, K\) or \(M, N, K\) with M=2, K=9"),
    ("multi_sample_linear", 2, x(2, 5), r"bias must have shape \[5\], got \[2, 5\]"),
    ("multi_sample_linear_dgrad", 1, x(4, 9), r"weight must have shape .* with M=2, N=5, got \[4, 9\]"),
    ("multi_sample_linear_wgrad", 1, x(3, 9), r"x must have shape \(…, K\) of grad"),
    ("multi_sample_scale", 2, 129, r"num_samples must be in \[1, 128\], got 129"),
    ("multi_sample_scale", 6, 2**34, r"col_offset must be in \[0, 2\*\*34 - cols\]"),
    ("linear_dropout", 4, "tanh", "activation must be one of none, relu, gelu, silu, got 'tanh'"),
    ("linear_dropout", 3, torch.ones(4, 4, dtype=torch.float64), "residual must have shape"),
    ("mixout", 1, torch.ones(4, 8, dtype=torch.float64), "anchor must have the shape of weight = "),
    ("mixout", 1, torch.ones(4, 9), "anchor must be torch.float64, got torch.float32"),
    ("mixout_linear", 0, torch.ones(4, 8, dtype=torch.float64), r"weight must have shape \(N, K=8\)"),
    ("act_dropout", 1, torch.ones(4, 8, dtype=torch.float64), "residual must have shape"),
    ("act_dropout_grad", 1, torch.ones(4, 8, dtype=torch.float64), r"z must have shape \[4, 9\]"),
    ("block_dropout_linear", 0, x(4, 70), r"x must have three dimensions \(G, M, cols\), got \[4, 70\]"),
    ("block_dropout_linear", 1, x(5, 69), r"weight must have shape \(N, K=70\), got \[5, 69\]"),
    ("block_dropout_linear", 3, KEPT[0], r"kept must have shape \(1, 1, k\) on cpu, got \[1, 3\]"),
    ("block_dropout_linear", 3, KEPT + 1, r"kept must hold blocks in \[0, n\], got 4"),
    ("block_dropout_linear", 3, KEPT.int(), "kept must be torch.int64, got torch.int32"),
    ("block_dropout_linear", 4, 0, "block must be at least 1, got 0"),
    ("block_dropout_linear_dgrad", 1, x(4, 70), r"weight must have shape \(N=5, K\), got \[4, 70\]"),
    ("block_dropout_linear_wgrad", 1, x(1, 3, 70), r"x must have shape \(G, M, K\) = \(1, 4, K\), got \[1, 3, 70\]"),
    ("kept_blocks", 0, torch.tensor(1.0), "key must be int64, got torch.float32"),
    ("kept_blocks", 0, torch.zeros(1, 1, dtype=torch.int64), r"key must have shape \(\) or \(G,\), got \[1, 1\]"),
    ("kept_blocks", 1, -1, "rows must be at least 0, got -1"),
    ("kept_blocks", 3, 8, r"kept must be in \[0, n\], got 8"),
    ("kept_blocks", 3, 7, r"coin must be in \[0, 2\*\*32\), and 0 where all are kept, got 5"),
    ("kept_blocks", 6, 2**32, r"row_offset must be in \[0, 2\*\*32 - rows\], got 4294967296"),
    ("lora_linear", 3, torch.ones(2, 8, dtype=torch.float64), r"lora_a must have shape \(r, K\) = \(2, 9\)"),
    ("lora_linear", 3, torch.ones(2, 9).half(), "lora_a must be torch.float64, got torch.float16"),
    ("lora_linear", 4, torch.ones(4, 2, dtype=torch.float64), r"lora_b must have shape \(N, r\) = \(5, 2\)"),
    ("lora_linear_down", 1, torch.ones(9, dtype=torch.float64), r"lora_a must have shape \(r, K\), got \[9\]"),
    ("lora_linear_dgrad", 1, torch.ones(4, 9, dtype=torch.float64), r"weight must have shape \(N, K\) with grad"),
    ("lora_linear_dgrad", 2, torch.ones(3, 2, dtype=torch.float64), "ds must have the 4 rows of grad, got 3"),
    ("lora_linear_dgrad", 3, torch.ones(3, 9, dtype=torch.float64), r"lora_a must have shape \(r, K\) = \(2, 9\)"),
    ("lora_linear_wgrad", 0, torch.ones(4, 2), "ds must be torch.float64, got torch.float32"),
    ("lora_linear_wgrad", 1, torch.ones(3, 9, dtype=torch.float64), "x must have the 4 rows of ds"),
    ("accept_path", 0, KEYS, r"tokens must have shape \[4, 3\] on cpu, got \[2\]"),
    ("accept_path", 2, torch.ones(4, 3), "logsumexp must be torch.float64, got torch.float32"),
    ("accept_path", 3, DRAFTS.int(), "draft_token_ids must be int64, got torch.int32"),
    ("accept_path", 4, PARENTS + 1, r"parents must be in \[0, n\] for draft n, got 1 for draft 0"),
    ("tree_keys", 0, KEYS, r"key must have shape \[4\] on cpu, got \[2\]"),
    ("tree_keys", 1, KEYS, r"positions must have shape \[4\] on cpu, got \[2\]"),
    ("tree_keys", 2, PARENTS[0], r"parents must have shape \(B, N\), got \[2\]"),
    ("tree_keys", 2, PARENTS - 1, r"parents must be in \[0, n\] for draft n, got -1 for draft 0"),
    ("csr_sketch", 1, torch.tensor([0, 2, 1, 3]), "crow must ascend"),
    ("csr_sketch", 2, torch.tensor([0, 5, 1]), r"col must ascend within a row and lie in \[0, 5\)"),
    ("dense_sketch", 0, x(9), r"a must have shape \(m, n\), got \[9\]"),
    ("dense_sketch", 2, "cauchy", "family must be gaussian or rademacher, got 'cauchy'"),
    ("dense_sketch", 5, 9, "rows must satisfy"),
    ("dense_sketch_adjoint", 0, x(2, 6, 4), r"y must have shape \(K, rows, n\) = \(2, 5, n\), got \[2, 6, 4\]"),
    ("dense_sketch_entries", 4, -1, "col_offset must be in"),
    ("distinct_rows", 3, 41, r"count must be in \[0, 40\], got 41"),
    ("random_words", 0, torch.ones(2, 3), "key must be int64, got torch.float32"),
    ("random_words", 1, KEYS, r"number must have the shape of key = \[2, 3\] on cpu, got \[2\]"),
    ("random_words", 2, KEYS, r"sample must have the shape of key = \[2, 3\] on cpu, got \[2\]"),
    ("random_words", 3, 2**32, r"domain must be in \[0, 2\*\*32\), got 4294967296"),
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
        return a.detach().float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a

    for sample in SAMPLES[name]:
        arguments = tuple(map(single, sample))
        expected = _registry.overloads("randfuse")[name](*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            got = _registry.overloads("randfuse")[name](*arguments)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_import_surface():
    assert set(randfuse.__all__) <= set(dir(randfuse))
