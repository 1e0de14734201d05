"""Memory and launches of one call, measured apart from its time."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .case import Inputs


def saved_for_backward(forward: Callable[[Inputs], Tensor], leaves: Inputs) -> int:
    """Bytes that the graph of `forward` keeps alive beside its inputs: masks, dropped copies, pre-activations."""
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward(leaves)  # alive while its storages are counted: a freed address may be handed out again
    del out
    return sum(kept.values())


def peak(call: Callable[[], object], device: str) -> int:
    """Most bytes of tensors alive at once during the call, beyond those alive before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and stop on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        out = call()
        del out
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()  # negative when freed
        most = max(most, alive)
    return most


def launches(call: Callable[[], object]) -> int:
    """Kernels that one call puts on the GPU; copies and fills by the driver count too."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in trace.events())
