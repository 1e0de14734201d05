"""`python -m randfuse.info`: what is installed, which backends run here, and why the others do not."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

import torch

from . import _backends, _extension, _table
from .bench import env
from .testing import guard_onednn


def gather() -> dict[str, Any]:
    """Everything that is printed, as JSON values."""
    return {
        "versions": {k: v for k, v in env.versions().items() if k != "extension"},
        "commit": env.commit(),
        "extension": {"problem": _extension.problem, "build": None if _extension.problem else _extension.build_info()},
        "backends": {b: _backends.unavailable(b) for b in _backends.BACKENDS if b != "auto"},
        "cpu": env.cpu(),
        "gpus": [env.gpu(i) for i in range(torch.cuda.device_count())],
        "onednn": guard_onednn(),
        "dispatch": [
            {"ops": list(ops), "where": _condition(applies), "backend": backend, "evidence": evidence}
            for ops, applies, backend, evidence in _table.TABLE
        ],
    }


def _condition(applies: Any) -> str:
    """The condition of a table entry as it is written there."""
    source = inspect.getsource(applies)
    body = source[source.index("lambda") :].split(":", 1)[1].strip()
    depth = 0
    for at, character in enumerate(body):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0 or (depth == 0 and character == ","):  # the end of the entry, or of its field
            return body[:at]
    return body


def render(found: dict[str, Any]) -> str:
    lines = ["randfuse " + found["versions"]["randfuse"] + (f" ({found['commit']})" if found["commit"] else "")]
    lines += [f"  {k:<10} {v or 'not installed'}" for k, v in found["versions"].items() if k != "randfuse"]
    lines += ["backends"]
    lines += [f"  {name:<10} {'available' if reason is None else reason}" for name, reason in found["backends"].items()]
    lines += ["extension"]
    build = found["extension"]["build"] or {"missing": found["extension"]["problem"]}
    lines += [f"  {k:<10} {v}" for k, v in build.items() if v != ""]
    lines += ["CPU"] + [f"  {k:<10} {_cpu(k, v)}" for k, v in found["cpu"].items()]
    if found["onednn"]:
        lines += [f"  {'oneDNN':<10} {found['onednn']}"]
    lines += ["GPUs"] + ([f"  {_gpu(gpu)}" for gpu in found["gpus"]] or ["  none that torch sees"])
    lines += ["dispatch of CUDA tensors (first match; otherwise the CUDA kernels)"]
    lines += [f"  {', '.join(e['ops'])} if {e['where']}: {e['backend']}; {e['evidence']}" for e in found["dispatch"]]
    return "\n".join(lines)


def _cpu(name: str, value: Any) -> str:
    return f"{value / 2**20:.0f} MiB" if name == "last_level_cache" else str(value)


def _gpu(gpu: dict[str, Any]) -> str:
    extra = ", ".join(f"{k} {v}" for k, v in gpu.items() if k not in ("name", "memory", "l2"))
    return f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, L2 {gpu['l2'] / 2**20:.0f} MiB, {extra}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m randfuse.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    found = gather()
    print(json.dumps(found, indent=1) if args.json else render(found))


if __name__ == "__main__":
    main()
