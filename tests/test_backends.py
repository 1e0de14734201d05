"""Choice of kernels: forcing, reasons, the dispatch table."""

from __future__ import annotations

import pytest
import randfuse
import torch
from randfuse import _backends, _extension, _table


def test_use_backend_nests_and_restores():
    assert _backends._forced == "auto"
    with randfuse.use_backend("reference"):
        with randfuse.use_backend("auto"):
            assert _backends._forced == "auto"
        assert _backends._forced == "reference"
    with pytest.raises(KeyError), randfuse.use_backend("reference"):
        raise KeyError
    assert _backends._forced == "auto"


def test_one_instance_may_be_entered_again():
    reference = randfuse.use_backend("reference")
    with reference, reference:
        pass
    assert _backends._forced == "auto"


def test_the_choice_for_cuda_tensors_can_be_compiled():
    """No call in it may be opaque to the compiler: fullgraph would fail on every GPU."""

    def chooses(x, w):
        return x if _backends._auto("dropout_linear", "cuda", (x, w)) else w

    x, w = torch.ones(4, 5), torch.ones(3, 5)
    assert torch.compile(chooses, backend="eager", fullgraph=True)(x, w) is not None


def test_unknown_backend():
    with pytest.raises(ValueError, match="^use_backend: backend must be one of auto, .*, got 'gpu'"):
        randfuse.use_backend("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_missing_backends_say_why_and_what_to_do(backend):
    with pytest.raises(RuntimeError, match=f"^use_backend: backend must be available, got '{backend}': .+"):
        randfuse.use_backend(backend)


@pytest.mark.parametrize(("op", "has_cuda", "backend"), [
    ("hadamard_transform", True, "cuda"),
    ("hadamard_transform", False, "reference"),
    ("mixout", True, "triton"),
    ("dropout_mask", False, "triton"),
    ("distinct_rows", True, "reference"),
])  # fmt: skip
def test_ops_run_where_they_have_a_kernel(op, has_cuda, backend, monkeypatch):
    monkeypatch.setattr(_backends, "_HAS_TRITON", True)
    monkeypatch.setattr(_extension, "has_cuda", has_cuda)
    assert _backends._auto(op, "cuda", ()) == backend


@pytest.mark.parametrize(("op", "shapes", "dtype", "backend"), [
    ("dropout_linear", ((64, 4096), (16, 4096)), torch.bfloat16, "cuda"),
    ("dropout_linear", ((64, 4096), (1024, 4096)), torch.bfloat16, "triton"),
    ("dropout_linear", ((64, 4096), (4096, 4096)), torch.bfloat16, "cuda"),
    ("dropout_linear", ((64, 4096), (1024, 4096)), torch.float32, "cuda"),
    ("dropout_linear", ((64, 4096), (16, 4096)), torch.float32, "triton"),
    ("dropout_linear_dgrad", ((64, 1024), (1024, 4096)), torch.float16, "triton"),
    ("dropout_linear_wgrad", ((64, 1024), (64, 4096)), torch.float16, "triton"),
    ("dropout_linear_wgrad", ((64, 128), (64, 4096)), torch.float16, "cuda"),
    ("linear_dropout", ((64, 1024), (4096, 1024)), torch.bfloat16, "triton"),
    ("linear_dropout", ((64, 4096), (1024, 4096)), torch.bfloat16, "cuda"),
    ("multi_sample_linear", ((64, 4096), (16, 4096)), torch.bfloat16, "cuda"),
    ("multi_sample_linear", ((64, 4096), (3, 16, 4096)), torch.float32, "triton"),
    ("multi_sample_linear_wgrad", ((3, 64, 16), (64, 4096)), torch.bfloat16, "cuda"),
    ("multi_sample_cross_entropy", ((64, 4096), (1024, 4096)), torch.bfloat16, "triton"),
    ("multi_sample_cross_entropy_grad", ((64,), (3, 64), (64, 4096), (16, 4096)), torch.bfloat16, "cuda"),
    ("dropout", ((64, 4096), ()), torch.bfloat16, "cuda"),
])  # fmt: skip
def test_table(op, shapes, dtype, backend):
    assert _table.choose(op, tuple(torch.empty(s, dtype=dtype, device="meta") for s in shapes)) == backend


def test_every_entry_carries_its_evidence():
    for entry in _table.TABLE:
        assert entry.backend in ("cuda", "triton")
        assert len(entry.evidence) > 40, "an entry says how we know"
        assert set(entry.ops) <= set(randfuse.reference.FUNCTIONS)
