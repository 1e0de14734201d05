"""The C++ tests: random streams, and every CUDA kernel executed on the CPU under the SIMT executor with sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{output[-6000:]}"
    return output


@pytest.mark.slow
def test_cpp_tests_pass(request: pytest.FixtureRequest) -> None:
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed (`pip install cmake`), so the C++ tests cannot be built")
    build = str(request.config.cache.mkdir("cpp-tests"))  # kept, so that the next run compiles only what changed
    run("cmake", "-S", ".", "-B", build, "-DRANDFUSE_CORE=OFF")
    run("cmake", "--build", build, "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count())))
    output = run("ctest", "--test-dir", build, "--output-on-failure", "--timeout", "300")
    assert "100% tests passed" in output, f"ctest ran nothing:\n{output}"
