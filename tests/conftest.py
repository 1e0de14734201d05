"""Fixtures that every test file may use."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from randfuse import _backends, testing

testing.guard_onednn()  # before torch's first matrix product

# The backends that a test of this process can be run on, with the device each wants. Triton on the CPU needs its
# interpreter, which is a switch of the whole process: test_triton.py has it.
BACKENDS = [pytest.param(("reference", "cpu"), id="reference"), pytest.param(("cpu", "cpu"), id="cpu")]
if torch.cuda.is_available():
    BACKENDS += [pytest.param((name, "cuda"), id=name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]


if os.environ.get("TRITON_INTERPRET") == "1":
    # The interpreter types a comparison like its operands, so that a truth value spread to a block becomes a block of
    # integers; Triton 3.9 refuses these as masks. Its compiler is right.
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def typed(self: InterpreterBuilder, *operands: object, plain=InterpreterBuilder.binary_op) -> TensorHandle:
        result = plain(self, *operands)
        return TensorHandle(result.data, tl.int1) if result.data.dtype == bool else result

    InterpreterBuilder.binary_op = typed


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest):
    """Runs the test on each backend and yields the device of its tensors."""
    yield from _on_backend(*request.param)


@pytest.fixture(params=BACKENDS[1:])
def kernels_device(request: pytest.FixtureRequest):
    """The same without the reference, for tests that compare with it."""
    yield from _on_backend(*request.param)


def _on_backend(backend: str, device: str):
    reason = _backends.unavailable(backend)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    with _backends.use_backend(backend):
        yield device


@pytest.fixture
def tensors_lie_with_the_kernels(request: pytest.FixtureRequest):
    """For tests that name no device: what they make lies where the backend of `device` or `kernels_device` runs."""
    names = [name for name in ("device", "kernels_device") if name in request.fixturenames]
    with torch.device(request.getfixturevalue(names[0])) if names else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _one_tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """On a GPU one tile a product: tuning every shape of the suite would compile some two thousand kernels."""
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available() and not _backends.unavailable("triton"):
        from randfuse.triton_kernels import block_dropout_linear, dropout_linear, gemm, tuning

        kernels = [
            block_dropout_linear.block_dropout_linear_dgrad_kernel,
            block_dropout_linear.block_dropout_linear_kernel,
            block_dropout_linear.block_dropout_linear_wgrad_kernel,
            dropout_linear.dropout_linear_kernel,
            dropout_linear.dropout_linear_wgrad_kernel,
            gemm.product_dropout_kernel,
        ]
        for kernel in kernels:
            prune = lambda configs, named, **_: tuning._of_dtype(configs, named)[-1:]  # noqa: E731
            monkeypatch.setattr(kernel, "early_config_prune", prune)


@pytest.fixture(autouse=True)
def _same_numbers_every_run():
    torch.manual_seed(0)
    torch._dynamo.reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests first, so that workers side by side end together. GPU tests are left out where there is no GPU, said
    once per test in the summary."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
