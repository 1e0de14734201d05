"""Timing: interleaved variants, one sample a call, cold caches, medians.

Variants take turns call by call and the order rotates every round, so that a drifting clock or a busy neighbour
reaches all of them alike (sequential rounds on shared machines differ by 2-3x). What a sample measures is the
business of a clock, which tests replace.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]
SHORT = 1e-3  # seconds; below it the host's launches would be part of a CUDA measurement


class Clock(Protocol):
    """Makes a sampler of a call: each invocation runs the call once and returns seconds."""

    def sampler(self, call: Call) -> tuple[Callable[[], float], str]:
        """The sampler, and in a word how it measures."""
        ...


class Summary(NamedTuple):
    median: float
    p20: float
    p80: float
    min: float
    n: int


def summarise(samples: list[float]) -> Summary:
    ordered = sorted(samples)

    def quantile(q: float) -> float:
        return ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))]

    return Summary(median(ordered), quantile(0.2), quantile(0.8), ordered[0], len(ordered))


def interleave(samplers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant: one sample a round, the order rotated by one place from round to round."""
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(samplers[name]())
    return samples


class CpuClock:
    """Wall clock. Cold: a buffer larger than the last-level cache is read before each call.

    Read, not written: dirty lines would have to be written back during the call that is measured.
    """

    def __init__(self, cold: bool) -> None:
        self.evict = torch.zeros(last_level_cache() * 5 // 4 // 8 if cold else 0, dtype=torch.int64)

    def sampler(self, call: Call) -> tuple[Callable[[], float], str]:
        call()

        def sample() -> float:
            self.evict.sum()
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return sample, "wall clock"


class CudaClock:
    """CUDA events around one call; calls shorter than a millisecond are replayed from a CUDA graph.

    The eviction (a read of twice the L2) is queued before the start event, so the host is ahead of the device and the
    gap between launches is not measured; for a graph the host has one launch to make, however many kernels it holds.
    """

    def __init__(self, cold: bool) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.evict = torch.zeros(2 * l2 // 8, dtype=torch.int64, device="cuda")
        self.cold = cold

    def _events(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.cold:
            self.evict.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def sampler(self, call: Call) -> tuple[Callable[[], float], str]:
        stream = torch.cuda.Stream()  # capture wants its warm-up on a side stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        if min(self._events(call) for _ in range(3)) > SHORT:
            return lambda: self._events(call), "events"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return lambda: self._events(graph.replay), "graph"


def clock(device: str, cold: bool) -> Clock:
    return CudaClock(cold) if device == "cuda" else CpuClock(cold)


def last_level_cache() -> int:
    """Bytes of the largest cache that Linux reports; 64 MiB where it reports none."""
    sizes = [_size(f.read_text()) for f in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=64 << 20)


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    text = text.strip()
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
