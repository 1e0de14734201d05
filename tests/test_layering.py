"""The rules of the house that a grep can check: layers, the grid of files, sizes, imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Which kernels an op has, by design: the rooms that every op of the kind must have a file in.
OPS = sorted(p.stem for p in (ROOT / "python/randfuse/ops").glob("*.py") if p.stem != "__init__")
ROOMS = [
    "python/randfuse/reference/{op}.py",
    "csrc/kernels/cpu/{op}.cpp",
    "csrc/kernels/cpu/{op}.h",
    "csrc/kernels/cuda/{op}.cu",
    "csrc/kernels/cuda/{op}.cuh",
    "csrc/bindings/{op}.cpp",
    "csrc/tests/test_cuda_{op}.cpp",
    "triton_kernels/{op}.py",
    "tests/test_{op}.py",
    "benchmarks/cases/{op}.py",
]
# The rooms that an op has nothing in, by design.
CPU = {"csrc/kernels/cpu/{op}.cpp", "csrc/kernels/cpu/{op}.h"}
CUDA = {"csrc/kernels/cuda/{op}.cu", "csrc/kernels/cuda/{op}.cuh", "csrc/tests/test_cuda_{op}.cpp"}
TRITON = {"triton_kernels/{op}.py"}
COMPOSED = {"python/randfuse/reference/{op}.py", "csrc/bindings/{op}.cpp"} | CPU | CUDA | TRITON
SKETCH = {"benchmarks/cases/{op}.py"}  # benchmarks/sketch.py has them all: a case is about dropped places
LACKS = {
    "block_dropout_linear": CPU | CUDA,  # on the CPU the library's products do the work
    "column_dropout_linear": COMPOSED,
    "dense_sketch": CUDA | SKETCH,
    "distinct_rows": CUDA | TRITON | SKETCH,
    "dropconnect_linear": CPU | CUDA,  # its pass is dropout's
    "embedding_dropout": set(ROOMS) - {"tests/test_{op}.py"},  # composed of torch, its own reference
    "hadamard_transform": TRITON | SKETCH,
    "kept_blocks": CUDA | {"benchmarks/cases/{op}.py"},  # a choice, not a product
    "linear_categorical_sample": COMPOSED,
    "mixout_linear": CUDA,
    "lora_linear": CPU | CUDA,  # on the CPU it runs dropout_linear's kernels, on GPUs Triton's
    "lora_updates": COMPOSED,
    "mc_dropout_predict": COMPOSED | {"benchmarks/cases/{op}.py"},  # no gradient, which every case has
    "multi_sample_linear": CPU,  # on the CPU it runs dropout_linear's kernels
    "multi_sample_mse": COMPOSED,
    "multinomial": COMPOSED | {"benchmarks/cases/{op}.py"},  # categorical_sample's kernels and case
    "random_words": CUDA | {"benchmarks/cases/{op}.py"},  # what steps are made of, not a step
    "sparse_sketch": SKETCH,
    "speculative_accept_tree": CUDA,  # keys of nodes and a walk, around categorical_sample_with_stats
}
# Kernels that the design has and the project not yet.
NOT_YET: dict[str, set[str]] = {}


def source_files(*suffixes: str, under: str = "") -> list[Path]:
    files = [p for s in suffixes for p in (ROOT / under).rglob(f"*{s}")]
    skip = {".venv", "build", "dist", ".git"}
    return [p for p in files if not skip & {part.split("-")[0] for part in p.relative_to(ROOT).parts}]


@pytest.mark.parametrize("op", OPS)
def test_one_op_one_name_in_every_room(op):
    missing = {room for room in ROOMS if not (ROOT / room.format(op=op)).exists()}
    expected = LACKS.get(op, set()) | NOT_YET.get(op, set())
    assert missing == expected, (
        f"{op} has no file in {missing - expected}, and one it should not have in {expected - missing}"
    )


def test_kernels_are_torch_free():
    for path in source_files(".h", ".cpp", ".cu", ".cuh", under="csrc/kernels"):
        include = re.search(r'#include *[<"](torch|ATen|c10|Python|pybind11)', path.read_text())
        assert not include, f"{path.relative_to(ROOT)}: {include and include[0]}"


def test_only_light_torch_headers_in_bindings():
    for path in source_files(".h", ".cpp", under="csrc/bindings"):
        text = path.read_text()
        assert "torch/extension.h" not in text, f"{path.name}: costs 26 s a file"
        assert "ATen/ATen.h" not in text, f"{path.name}: include ATen/ops/<op>.h"
        assert path.name == "module.cpp" or "pybind11" not in text, f"{path.name}: only module.cpp includes pybind11"


def test_data_flows_one_way():
    """Only _backends chooses kernels; ops never reach for torch.ops, kernels never for ops."""
    for path in source_files(".py", under="python/randfuse"):
        text = path.read_text()
        relative = path.relative_to(ROOT / "python/randfuse").as_posix()
        if relative not in ("_registry.py", "testing.py") and not relative.startswith("bench"):
            assert not re.search(r"(?<!`)torch\.ops\.randfuse", re.sub(r'""".*?"""|#.*', "", text, flags=re.S)), (
                relative
            )
        if relative.startswith("reference/"):
            assert not re.search(r"from \.\.(ops|nn|_backends|keys)", text), f"{relative} must stand alone"
        if relative.startswith("nn/"):
            assert "_backends" not in text, f"{relative} must call public ops"


def test_files_are_short():
    paths = source_files(".py", ".h", ".cpp", ".cu", ".cuh")
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in paths}
    assert not {p: n for p, n in lengths.items() if n > 600}, "no file above 600 lines"
    assert sorted(lengths.values())[len(lengths) // 2] <= 200, "the median file is at most 200 lines"


def test_listed_sources_exist_and_none_is_forgotten():
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    listed = {path for _, path in lines}
    found = {
        p.relative_to(ROOT / "csrc").as_posix()
        for folder in ("kernels", "bindings")
        for p in source_files(".cpp", ".cu", under=f"csrc/{folder}")
    }
    assert listed == found


def run(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    """No Triton, no CUDA context, no compiler machinery."""
    out = run(
        "import sys, torch, randfuse; print('triton' in sys.modules, torch.cuda.is_initialized(), "
        "any(m.startswith('torch._inductor') for m in sys.modules if m not in BEFORE))".replace(
            "import sys, torch, randfuse", "import sys, torch; BEFORE = set(sys.modules); import randfuse"
        )
    )
    assert out.split() == ["False", "False", "False"]


def test_import_without_extension():
    """The reference still works, and the reason and the remedy are said."""
    out = run(
        "import sys; sys.modules['randfuse._C'] = None\n"
        "import torch, randfuse\n"
        "print(randfuse._extension.problem)\n"
        "y = randfuse.dropout_linear(torch.ones(2, 9), torch.ones(3, 9), p=0.5, key=randfuse.key(1))\n"
        "print(y.shape[1])\n"
        "try: randfuse.use_backend('cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    problem, width, error = out.strip().splitlines()
    assert "is not built" in problem
    assert "pip install" in problem
    assert width == "3"
    assert error.startswith("use_backend: backend must be available, got 'cpu': ")
