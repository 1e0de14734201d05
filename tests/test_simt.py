"""The C++ tests: random streams, and every CUDA kernel executed on the CPU under the SIMT executor with sanitizers.

CMake builds its library of CPU kernels beside them, so that the one list of sources stays buildable without torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{output[-6000:]}"
    return output


def tool(name: str) -> str | None:
    """Beside the interpreter, where pip puts it also when no environment is activated, or on PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


@pytest.mark.slow
def test_cpp_tests_pass() -> None:
    cmake, ctest = tool("cmake"), tool("ctest")
    if cmake is None or ctest is None:
        pytest.skip("cmake is not installed (`pip install cmake`), so the C++ tests cannot be built")
    build = "build/cpp-tests"  # kept, so that the next run compiles only what changed
    run(cmake, "-S", ".", "-B", build, "-DRANDFUSE_CORE=ON")
    run(cmake, "--build", build, "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count())))
    output = run(ctest, "--test-dir", build, "--output-on-failure", "--timeout", "300", "--parallel", "2")
    assert "100% tests passed" in output, f"ctest ran nothing:\n{output}"
