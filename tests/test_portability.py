"""The CPU kernels compile for other compilers and processors, where those compilers are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/kernels/cpu").glob("*.cpp"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
@pytest.mark.parametrize("compiler", ["g++", "clang++", "aarch64-linux-gnu-g++"])
def test_compiles_without_warnings(compiler, source):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    flags += ["-Wno-unknown-warning-option"] if "clang" in compiler else []
    done = subprocess.run([compiler, *flags, "-fsyntax-only", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
