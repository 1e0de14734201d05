"""`random_words`: words of the stream at coordinates that differ from element to element.

Serves derived keys (`randfuse.fold_in`, `split`) and the coins of masked-diffusion steps, where every sequence has a
key. Some 200 operations in plain PyTorch, which small batches would feel: a step costs 2 ms more. No CUDA kernel by
design: one launch of Triton's is all that it takes. No case: its cost stands in that of `masked_diffusion`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backends import call
from .._registry import rules


def random_words(key: Tensor, number: Tensor, sample: Tensor, domain: int) -> tuple[Tensor, Tensor]:
    """Two 64-bit words, r0 | r1 << 32 and r2 | r3 << 32, of each block: ten rounds of Philox4x32.

    Equivalent to: ``reference.random_words`` of the same tensors, broadcast. int64 in and out; block `number`, of 64
    bits, has its low half as j and its high half as i, `sample` is s, `domain` the whole word D of docs/streams.md.

    >>> low, high = random_words(randfuse.split(randfuse.key(0), 2), *torch.zeros(2, 1, dtype=torch.int64), 0x01000C06)
    >>> low.shape
    torch.Size([2])
    """
    key, number, sample = torch.broadcast_tensors(key, number, sample)
    return call("random_words", key, number, sample, domain)


def _fake(key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return key.new_empty(key.shape), key.new_empty(key.shape)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    *tensors, domain = args
    own = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims[:3], strict=True)
    ]
    return tuple(call("random_words", *own, domain)), (0, 0)


rules("random_words", _fake, vmap=_vmap)
