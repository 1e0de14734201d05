"""Fixtures that every test file may use."""

from __future__ import annotations

import pytest
import torch
from randfuse import _backends, testing

testing.guard_onednn()  # before torch's first matrix product

# The backends that a test of this process can be run on, with the device each wants. Triton on the CPU needs its
# interpreter, which is a switch of the whole process: test_triton.py has it.
BACKENDS = [pytest.param(("reference", "cpu"), id="reference"), pytest.param(("cpu", "cpu"), id="cpu")]
if torch.cuda.is_available():
    BACKENDS += [pytest.param((name, "cuda"), id=name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest):
    """Runs the test on each backend and yields the device of its tensors."""
    backend, device = request.param
    reason = _backends.unavailable(backend)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    with _backends.use_backend(backend):
        yield device


@pytest.fixture(autouse=True)
def _same_numbers_every_run():
    torch.manual_seed(0)
    torch._dynamo.reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests are left out where there is no GPU, said once per test in the summary."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
