"""Keys: one int64 names a random stream. Every function here is pure but `draw_key`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._backends import call
from .reference import streams


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def key(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Key () of a seed; any two different seeds mod 2**64 are independent streams, so 0, 1, 2 … are good."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"key: seed must be an int, got {type(seed).__name__}")
    return torch.tensor(_signed(seed), dtype=torch.int64, device=device)


def draw_key(device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """Fresh key () from `generator`, or from torch's default one for `device` (so `torch.manual_seed` governs it).

    Traceable: compiled code, CUDA graphs and activation checkpointing see an ordinary `torch.randint`.
    `generator` is for eager code only.
    """
    high, low = torch.randint(0, 2**32, (2,), dtype=torch.int64, device=device, generator=generator).unbind()
    return (high << 32) | low


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Independent key for each `(key, data)`; `data` is an int or an int64 tensor that broadcasts against `key`.

    A step counter, layer number, rank or position folded into a key gives a stream of its own. Folding is no
    addition: `fold_in(fold_in(k, a), b)` differs from `fold_in(k, a + b)`.
    """
    _key("fold_in", key)
    if not isinstance(data, Tensor):
        if isinstance(data, bool) or not isinstance(data, int):
            raise TypeError(f"fold_in: data must be an int or an int64 Tensor, got {type(data).__name__}")
        data = torch.full((), _signed(data), dtype=torch.int64, device=key.device)
    if data.dtype != torch.int64:
        raise TypeError(f"fold_in: data must be int64, got {data.dtype}")
    return _fold(key, data)


def split(key: Tensor, n: int) -> Tensor:
    """`n` independent keys: shape (n,) of a key (), (…, n) of keys (…)."""
    _key("split", key)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"split: n must be a positive int, got {n}")
    return _fold(key.unsqueeze(-1), torch.arange(n, device=key.device))


def effective_p(p: float | Tensor) -> float | Tensor:
    """Probability really used for `p`: the multiple of 2**-16 nearest to it (halves go to even)."""
    _checks.probability("effective_p", p, p.device if isinstance(p, Tensor) else torch.device("cpu"))
    return streams.threshold(p) / 65536


def resolve(key: Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The key an op runs with: the caller's or a fresh one."""
    return draw_key(device, generator) if key is None else key


def check(op: str, key: object, generator: object, rows: int, device: torch.device) -> None:
    """The caller's key and generator, also where nothing will be drawn."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")
    if key is not None and generator is not None:
        raise ValueError(f"{op}: generator must be None when key is given, got both")
    if key is not None:
        _checks.key_tensor(op, key, rows, device)


def _fold(key: Tensor, data: Tensor) -> Tensor:
    key, data = torch.broadcast_tensors(key, data)
    return call("random_words", key, data, torch.zeros_like(data), streams.domain_word(0, 128))[0]


def _key(op: str, key: object) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        got = key.dtype if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"{op}: key must be an int64 Tensor (see randfuse.key), got {got}")
