"""Compiles every CUDA source of csrc/sources.txt for each target and prints registers, shared memory, stack and spills.

    python tools/resource_table.py [kernels/cuda/dropout.cu …] [--nvcc PATH] [--arch 80 90a 100]

Exit status 1 when a file does not compile or a kernel spills registers or has a stack frame (an array that the compiler
indexes at run time lives in memory). Without nvcc: one sentence, status 0.
Shared memory is the static part; the launchers of dropout_linear ask for more at run time.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90a", "100")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.S,
)


def sources() -> list[str]:
    lines = (line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines())
    return [words[1] for words in lines if words and words[0] == "cuda"]


def compile_verbose(nvcc: str, source: str, archs: list[str]) -> str:
    """The output of ptxas for all targets; one nvcc call per file."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *targets, "-c", str(ROOT / "csrc" / source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source} does not compile:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def readable(mangled: str) -> str:
    """`dropout_kernel<float, true>` of a mangled name, where c++filt is there."""
    if not shutil.which("c++filt"):
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\((?:randfuse::)?(?:cuda::)?Activation\)", "act ", name).removeprefix("void ")
    return re.sub(r"randfuse::(cuda::)?|\(bool\)|\(int\)", "", name).split("(")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=sources(), help="as csrc/sources.txt names them; default: all")
    parser.add_argument("--nvcc", default=shutil.which("nvcc"), help="default: the one on PATH")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help=f"default: {' '.join(ARCHS)}")
    args = parser.parse_args()
    if args.nvcc is None:
        print("resource_table: nvcc was not found, so no CUDA kernel was compiled; install the CUDA toolkit (12.8+).")
        return 0
    print(f"{'kernel':<64} {'arch':>5} {'registers':>9} {'shared':>6} {'stack':>5} {'spill':>5}")
    offenders, kernels = [], 0
    for source in args.sources:
        for match in ENTRY.finditer(compile_verbose(args.nvcc, source, args.arch)):
            kernels += 1
            stack, spill = int(match["stack"]), int(match["stores"]) + int(match["loads"])
            name = readable(match["name"])
            print(
                f"{name:<64} {match['arch']:>5} {match['registers']:>9} {match['shared'] or 0:>6} {stack:>5} {spill:>5}"
            )
            if spill or stack:
                offenders.append(f"{name} (sm_{match['arch']})")
    print(f"{kernels} kernels, {len(offenders)} with spills or a stack frame")
    if kernels == 0:
        print("resource_table: ptxas said nothing that this script understands", file=sys.stderr)
        return 1
    if offenders:
        print("resource_table: spills or a stack frame in " + ", ".join(offenders), file=sys.stderr)
    return 1 if offenders else 0


if __name__ == "__main__":
    sys.exit(main())
