"""What PyTorch has to know of each op beside its kernels: output shapes, derivatives, batching.

Written once per op (at the end of `ops/<op>.py`) and used for every namespace that has kernels for it: `randfuse`
(C++/CUDA) and `randfuse_triton`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rules:
    fake: Callable
    setup_context: Callable | None = None
    backward: Callable | None = None
    vmap: Callable | None = None


_rules: dict[str, Rules] = {}
_installed: dict[str, dict[str, Callable]] = {}
_transformable: dict[str, dict[str, Callable]] = {}


def rules(name: str, fake: Callable, **others: Callable) -> None:
    """Declare the rules of the op `name`."""
    _rules[name] = Rules(fake, **others)


def install(namespace: str) -> None:
    """Give the ops that `torch.ops.<namespace>` has their rules; kernels must be registered already."""
    _installed[namespace], _transformable[namespace] = {}, {}
    for name, rule in _rules.items():
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is None:
            continue
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, rule.fake)
        if rule.backward is not None:
            torch.library.register_autograd(qualified, rule.backward, setup_context=rule.setup_context)
        if rule.vmap is not None:
            torch.library.register_vmap(qualified, rule.vmap)
        _installed[namespace][name] = packet.default
        _transformable[namespace][name] = _function(packet.default, rule).apply


def overload(namespace: str, name: str) -> Callable:
    """One op. Asked of torch and not of our table: a trace that itself imported the Triton kernels sees that stale."""
    return getattr(getattr(torch.ops, namespace), name).default


def overloads(namespace: str) -> dict[str, Callable]:
    """The installed ops of a namespace by name; empty when it has no kernels in this process."""
    return _installed.get(namespace, {})


def transformable(namespace: str) -> dict[str, Callable]:
    """The same for calls under `torch.func`, whose transforms do not see an op's registered derivative."""
    return _transformable.get(namespace, {})


def _function(op: Callable, rule: Rules) -> type[torch.autograd.Function]:
    members: dict[str, Any] = {"forward": staticmethod(op)}
    for member in ("setup_context", "backward", "vmap"):
        given = getattr(rule, member)
        members[member] = staticmethod(given if given is not None else _nothing)
    return type("Transformable", (torch.autograd.Function,), members)


def _nothing(*_: Any) -> tuple[None, ...]:
    return ()
