"""Builds `randfuse._C`. Metadata is in pyproject.toml; the sources are listed in csrc/sources.txt.

Environment: RANDFUSE_BUILD_CUDA=auto|0|1, RANDFUSE_CUDA_ARCHS="8.0;9.0a;10.0+PTX" (default: this machine's GPU, else
those), RANDFUSE_BUILD_EXTENSION=0 for a pure-Python install, MAX_JOBS, DEBUG=1. Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def sources(*kinds: str) -> list[str]:
    lines = (line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines())
    return [f"csrc/{entry[1]}" for entry in lines if entry and entry[0] in kinds]


def nvcc_version(cuda_home: str) -> tuple[int, int]:
    out = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", out).groups()
    return int(major), int(minor)


def cuda_reason() -> str:
    """Why CUDA kernels are not built and what to do; empty when they are."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wish = os.environ.get("RANDFUSE_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: RANDFUSE_BUILD_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return "switched off by RANDFUSE_BUILD_CUDA=0"
    reason = ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    elif CUDA_HOME is None or not Path(CUDA_HOME, "bin/nvcc").exists():
        reason = "nvcc was not found: install the CUDA toolkit or set CUDA_HOME"
    elif not Path(CUDA_HOME, "include/cuda_runtime_api.h").exists():
        reason = f"{CUDA_HOME} has no CUDA headers: set CUDA_HOME to the toolkit"
    elif nvcc_version(CUDA_HOME)[0] != int(torch.version.cuda.split(".")[0]):
        major, minor = nvcc_version(CUDA_HOME)
        reason = f"nvcc is {major}.{minor} and torch wants CUDA {torch.version.cuda}: install the matching toolkit"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        reason = "the GPU is older than sm_80: the CPU and Triton kernels remain"
    if wish == "1" and reason:
        raise SystemExit(f"setup.py: RANDFUSE_BUILD_CUDA=1 needs CUDA, but {reason}")
    return reason


def cuda_archs() -> str:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = os.environ.get("RANDFUSE_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    archs = [a for a in wanted.replace(" ", ";").split(";") if a]
    if not all(re.match(r"\d+\.\d", a) for a in archs):
        raise SystemExit(f"setup.py: RANDFUSE_CUDA_ARCHS must read like 8.0;9.0a;10.0+PTX, got {wanted!r}")
    kept = [a for a in archs if int(a.split(".")[0]) >= 8]  # images export lists that begin with 7.5
    if kept:
        return ";".join(kept)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{major}.{minor}{'a' if major == 9 else ''}"
    return "8.0;9.0a;10.0+PTX" if nvcc_version(CUDA_HOME) >= (12, 8) else "8.0+PTX;9.0a"


def max_jobs() -> int:
    """One compiler a core, but no more than fit into memory at 3 GB each."""
    try:
        info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        memory = int(info["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):  # not Linux
        memory = 8 << 30
    return max(1, min(os.cpu_count() or 1, int(memory * 0.85) // (3 << 30)))


def extensions() -> tuple[list, dict]:
    if os.environ.get("RANDFUSE_BUILD_EXTENSION", "1") == "0":
        print("randfuse: no extension (RANDFUSE_BUILD_EXTENSION=0); reference and Triton backends only")
        return [], {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"setup.py: {error.name} must be installed first; then `pip install --no-build-isolation .`"
        ) from error
    reason = cuda_reason()
    archs = "" if reason else cuda_archs()
    os.environ.setdefault("MAX_JOBS", str(max_jobs()))
    debug = os.environ.get("DEBUG") == "1"
    macros = [("RANDFUSE_TORCH_VERSION", f'"{torch.__version__}"'), ("RANDFUSE_CUDA_REASON", f'"{reason}"')]
    if not reason:
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        macros += [("RANDFUSE_CUDA", "1"), ("RANDFUSE_CUDA_ARCHS", f'"{archs}"')]
    # -ffp-contract=off: results may not depend on whether a compiler fuses a multiply and an add.
    # gcc 12 warns of uninitialised values inside its own AVX-512 headers.
    host = ["-O0" if debug else "-O3", "-g" if debug else "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
    host += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    host += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's clang has none: kernels run on one thread there
    kinds = ("cpu", "binding") if reason else ("cpu", "binding", "cuda")
    print(
        f"randfuse: torch {torch.__version__}, CPU kernels for baseline, AVX2 and AVX-512 (chosen at run time)\n"
        f"randfuse: CUDA kernels {'for ' + archs if archs else 'left out: ' + reason}\n"
        f"randfuse: {'threads by OpenMP' if openmp else 'one thread, no OpenMP'}, "
        f"{os.environ['MAX_JOBS']} compilers at a time (MAX_JOBS)"
    )
    extension = (cpp_extension.CppExtension if reason else cpp_extension.CUDAExtension)(
        "randfuse._C",
        sources(*kinds),
        define_macros=macros,
        extra_compile_args={"cxx": host + openmp, "nvcc": ["-O3", "-lineinfo", "--expt-relaxed-constexpr"]},
        extra_link_args=openmp,
    )
    return [extension], {"build_ext": cpp_extension.BuildExtension}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
