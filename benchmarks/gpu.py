"""Everything to measure on a CUDA machine, in one go: rooflines, the rate of Philox, a preset of benchmarks, sketches.

    python benchmarks/gpu.py [--preset smoke|default|full]

writes `benchmarks/results/<machine>/<date>.json` after every group of rows, so that a run that is cut short leaves what
it had, and at the end its HTML and pictures. The exit status is 1 if any result is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import sketch  # the file beside this one
import torch
import triton
import triton.language as tl
from randfuse.bench import case, env, report, table, timing
from randfuse.bench.run import Options, run

BLOCK, CALLS = 1024, 256  # counters a program, Philox calls a counter


@triton.jit
def philox_kernel(out, seed, ROUNDS: tl.constexpr, CALLS: tl.constexpr, BLOCK: tl.constexpr):
    """XOR of CALLS blocks of four words for each counter: arithmetic only, 4 bytes written per CALLS · 16 drawn."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    row = i.to(tl.uint32)
    zero = row * 0
    total = zero
    for j in range(CALLS):
        a, b, c, d = tl.philox(seed, zero + j, row, zero, zero, ROUNDS)
        total = total ^ a ^ b ^ c ^ d
    tl.store(out + i, total.to(tl.int32, bitcast=True))


def philox_rate(clock: timing.Clock, device: str, rounds: int, programs: int) -> float:
    """Words of 32 bits a second, the best of a few samples; two 16-bit decisions come from each."""
    out = torch.empty(programs * BLOCK, dtype=torch.int32, device=device)
    sample, _ = clock.sampler(lambda: philox_kernel[(programs,)](out, 2024, rounds, CALLS, BLOCK))
    return 4 * CALLS * out.numel() / min(sample() for _ in range(7))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=case.PRESETS, default="default")
    preset = parser.parse_args().preset
    if not torch.cuda.is_available():
        print("gpu.py: torch must see a CUDA device, got none; `python -m randfuse.info` says more", file=sys.stderr)
        return 2
    clock = timing.clock("cuda", cold=False)
    programs = 64 * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    rates = {str(rounds): philox_rate(clock, "cuda", rounds, programs) for rounds in (7, 10)}
    for rounds, rate in rates.items():
        print(f"Philox4x32-{rounds}: {rate / 1e12:.2f} T words/s, {2 * rate / 1e12:.2f} T decisions of 16 bits/s")
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-")
    directory = Path(__file__).parent / "results" / name
    stem = f"{datetime.now(timezone.utc):%Y-%m-%dT%H%M%SZ}-{preset}"
    found = run(
        case.load(),
        Options(device="cuda", preset=preset),
        save=directory / f"{stem}.json",
        facts={"philox_words_per_second": rates},
    )
    print(table.render(found))
    sketches = {"environment": env.capture("cuda"), "ms": sketch.run("cuda", rounds=9)}
    (directory / f"{stem}-sketch.json").write_text(json.dumps(sketches, indent=1) + "\n")
    print("\n".join(map(str, [directory / f"{stem}.json", *report.write(found, directory, stem)])))
    return found.status()


if __name__ == "__main__":
    sys.exit(main())
