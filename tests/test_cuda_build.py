"""What nvcc can tell without a GPU: the kernels compile for every target without spills, the bindings against them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = [words for words in map(str.split, (ROOT / "csrc/sources.txt").read_text().splitlines()) if words]
KERNELS = sorted(words[1] for words in SOURCES if words[0] == "cuda")
BINDINGS = sorted(  # those with a CUDA half: the others are the same in every build
    words[1] for words in SOURCES if words[0] == "binding" and "RANDFUSE_CUDA" in (ROOT / "csrc" / words[1]).read_text()
)


@pytest.fixture(scope="module")
def cuda_include() -> str:
    """Folder of cuda_runtime_api.h, from the nvcc on PATH."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    tops = [line.split("TOP=")[1] for line in dry.splitlines() if "TOP=" in line]
    assert tops, f"nvcc --dryrun does not name its folder:\n{dry}"
    return str(Path(tops[0]) / "include")


@pytest.mark.slow
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_compile_without_spills(source: str, cuda_include: str) -> None:
    command = [sys.executable, "tools/resource_table.py", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"


@pytest.mark.slow
@pytest.mark.parametrize("source", BINDINGS)
def test_cuda_bindings_compile(source: str, cuda_include: str, tmp_path: Path) -> None:
    """Syntax only: a CPU build of torch has the CUDA headers but for one generated file."""
    stub = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    torch_include = Path(torch.__file__).parent / "include"
    includes = [torch_include, torch_include / "torch/csrc/api/include", cuda_include, tmp_path]
    command = [shutil.which("c++") or "g++", "-std=c++17", "-fsyntax-only"]  # torch's choice; newer ones take C++20
    command += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
    command += ["-DRANDFUSE_CUDA=1", '-DRANDFUSE_CUDA_ARCHS="9.0a"', '-DRANDFUSE_CUDA_REASON=""']
    command += [f'-DRANDFUSE_TORCH_VERSION="{torch.__version__}"', f"-I{sysconfig.get_path('include')}"]
    command += [argument for folder in includes for argument in ("-isystem", str(folder))]
    done = subprocess.run([*command, f"csrc/{source}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{source} does not compile with RANDFUSE_CUDA:\n{done.stderr[-4000:]}"
