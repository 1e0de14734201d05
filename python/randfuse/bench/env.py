"""Where and how a result was made."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _extension
from .timing import last_level_cache

# Variables that change what a CPU run measures.
VARIABLES = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "RANDFUSE_ISA",
    "LD_PRELOAD",
    "TRITON_INTERPRET",
)


def capture(device: str) -> dict[str, Any]:
    """The environment as JSON values."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": machine(device),
        "cpu": cpu(),
        "gpu": gpu(torch.cuda.current_device()) if device == "cuda" else None,
        "versions": versions(),
        "commit": commit(),
        "load": os.getloadavg()[0],
        "variables": {v: os.environ[v] for v in VARIABLES if v in os.environ},
    }


def busy() -> str | None:
    """A warning when other processes are using the CPUs: a barrier then waits for a thread that is not running."""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.3 * cpus:
        return None
    return f"the machine is busy (load {load:.1f} on {cpus} CPUs): CPU times will be too long, most of all short ones"


def machine(device: str) -> str:
    """What must agree before two results are compared."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu()['model']}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}"


def command_line() -> str:
    """The command as typed, the module's name in place of its file."""
    return " ".join(["python", "-m", "randfuse.bench", *sys.argv[1:]])


def cpu() -> dict[str, Any]:
    return {
        "model": _cpu_model(),
        "logical": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []  # not Linux
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        **_nvidia_smi(f"GPU-{properties.uuid}"),
    }


def _nvidia_smi(uuid: str) -> dict[str, str]:
    """Driver, clocks and power, which torch does not know; empty where the tool is not installed."""
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={uuid}"]
        values = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(names, values, strict=True))


def versions() -> dict[str, str | None]:
    return {
        "randfuse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "os": platform.platform(),
        "extension": str(_extension.build_info()) if _extension.problem is None else None,
    }


def commit() -> str | None:
    """Commit of the checkout that this package runs from, "-dirty" appended when files differ; None outside one."""
    where = Path(__file__).parent
    try:
        described = ["git", "-C", str(where), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
