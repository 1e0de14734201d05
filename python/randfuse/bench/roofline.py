"""What this machine can do, measured by the same clock and in the same cache state as the rows it judges.

A call that must read r bytes, write w and multiply f flops cannot take less than

    max( pairs·t_copy + rest·t_read or t_fill,  f / matmul rate )

where each byte written pairs with one read at the speed of a copy, and the rest goes at the speed of a pure read or
fill: a copy is charged exactly its own time, an op with a small output is not charged for writes that it does not do.
Rates depend on the size (caches), so probes of several sizes are kept and the faster of the two neighbours is used.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial

import torch

from .case import DTYPES, Cost
from .timing import Call, Clock, interleave

TOLERANCE = 1.05  # above 105 % of the roofline the byte count is wrong, not the kernel fast
PROBE_BYTES = {"cpu": (1 << 20, 8 << 20, 32 << 20, 128 << 20), "cuda": (8 << 20, 64 << 20, 512 << 20)}
# Squares, and the tall shapes that the cases use, which some libraries run faster.
PROBE_MATMULS = {
    "cpu": ((1024, 1024, 1024), (512, 4096, 1024)),
    "cuda": ((8192, 8192, 8192), (16384, 4096, 4096), (16384, 4096, 11008)),
}


@dataclass
class Roofline:
    """Bytes a second by probe size, and flops a second by dtype."""

    copy: dict[int, float] = field(default_factory=dict)  # bytes read + written
    read: dict[int, float] = field(default_factory=dict)
    fill: dict[int, float] = field(default_factory=dict)
    matmul: dict[str, float] = field(default_factory=dict)

    def seconds(self, cost: Cost, dtype: str) -> float:
        """Least time of a call."""
        paired = min(cost.read, cost.written)
        moved = 2 * paired / _near(self.copy, 2 * paired)
        moved += (cost.read - paired) / _near(self.read, cost.read)
        moved += (cost.written - paired) / _near(self.fill, cost.written)
        return max(moved, cost.flops / self.matmul[dtype] if cost.flops else 0.0)

    def improve(self, other: Roofline) -> None:
        """Keep the better of two measurements: the machine may have been busy during one."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.update({k: max(rate, mine.get(k, 0.0)) for k, rate in theirs.items()})


def impossible(seconds: float, least: float) -> str | None:
    """The reason to reject a time below the roofline, or None."""
    if least <= TOLERANCE * seconds:
        return None
    share = f"{100 * least / seconds:.0f} % of the measured roofline"
    return f"impossible: check the byte count, and that nothing else ran ({share})"


def _near(rates: dict[int, float], size: int) -> float:
    sizes = sorted(rates)
    at = bisect_left(sizes, size)
    return max(rates[s] for s in sizes[max(at - 1, 0) : at + 1])


def measure(clock: Clock, hot: Clock, device: str, dtypes: list[str], rounds: int = 7) -> Roofline:
    """Probe memory by `clock`, in the cache state of the rows, and matrix products by `hot`; the best sample counts."""
    roof = Roofline()
    for size in PROBE_BYTES[device]:
        source = torch.zeros(size // 4, device=device)
        target = torch.empty_like(source)
        read, dot, copy, fill = _best(
            clock,
            rounds,
            source.view(torch.int64).sum,
            partial(torch.dot, source, source),  # on some CPUs faster than the sum
            partial(target.copy_, source),
            partial(target.fill_, 1.0),
        )
        roof.copy[2 * size] = 2 * size / copy
        roof.read[size] = size / min(read, dot, copy)
        roof.fill[size] = size / min(fill, copy)
    for dtype in dtypes:
        times = []
        for m, k, n in PROBE_MATMULS[device]:
            a, b = (torch.rand(shape, device=device).to(DTYPES[dtype]) for shape in ((m, k), (n, k)))
            (best,) = _best(hot, rounds, partial(torch.nn.functional.linear, a, b))
            times.append(best / (2 * m * k * n))
        roof.matmul[dtype] = 1 / min(times)
    return roof


def _best(clock: Clock, rounds: int, *calls: Call) -> list[float]:
    samplers = {str(i): clock.sampler(call)[0] for i, call in enumerate(calls)}
    return [min(samples) for samples in interleave(samplers, rounds).values()]
