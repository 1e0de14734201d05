"""`linear_categorical_sample`: tokens from hidden @ weight.T, whose N×V logits are never stored.

Composed of the library's product and the categorical ops, so it has no reference, binding or kernel of its own.

Bytes: V·D weights and N·D hidden once, logits a chunk at a time, which stays in the cache; storing them would write and
read 2·N·V values more, 18 MB of bf16 for N = 64 and V = 126464. The product is the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from .._backends import call
from .categorical_sample import RaceWinner, arguments

CHUNK_BYTES = 2**24  # of float32 logits: in the L2 cache of a GPU, and on a CPU a small part of what W is


def linear_categorical_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    num_samples: int | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    exclude: Tensor | None = None,
    bitmask: Tensor | None = None,
    uncond_hidden: Tensor | None = None,
    cfg_scale: float = 0.0,
    method: Literal["race", "cdf"] = "race",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    """Draw tokens from the logits of a language-model head, without storing them.

    Equivalent to: ``randfuse.categorical_sample(F.linear(hidden, weight, bias), temperature, …)``: the same tokens
    with the same key and method, but for products that the library rounds differently for different shapes.

    "race" without filters goes through chunks of the vocabulary and keeps a score and a token a row: every weight is
    read once. Its one exponential a token costs little beside the product; the winner of the chunks is the race's own.
    Filters and "cdf" need whole rows, and go through chunks of rows: a chunk reads the weights again, which its
    products outweigh.

    Args:
        hidden: (…, D); select the rows that you need before.
        weight: (V, D), of the same dtype; V up to 2**20.
        bias: (V,) or None.
        uncond_hidden: like hidden, for guidance: its logits u give u + (cfg_scale + 1)(l − u).
        temperature, num_samples, top_k, top_p, min_p, exclude, bitmask, key, row_offset: as in `categorical_sample`.
        method: "race" or "cdf".

    No gradient flows. Returns int64 (…) or (…, num_samples).

    Raises:
        TypeError, ValueError: as in `categorical_sample`.

    >>> h, w, k = torch.randn(3, 8), torch.randn(5000, 8), randfuse.key(0)
    >>> tokens = linear_categorical_sample(h, w, key=k)
    >>> torch.equal(tokens, randfuse.categorical_sample(h @ w.T, method="race", key=k))
    True
    """
    op = "linear_categorical_sample"
    _checks.float_tensor(op, "hidden", hidden)
    _checks.float_tensor(op, "weight", weight, like=hidden)
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(weight.shape)} and {tuple(hidden.shape)}"
        raise ValueError(f"{op}: weight must have shape (V, D) for hidden (…, D), got {shapes}")
    vocab = weight.shape[0]
    if bias is not None:
        _checks.float_tensor(op, "bias", bias, like=hidden)
        _checks.shape(op, "bias", bias, (vocab,), "(V,)")
    if uncond_hidden is not None:
        _checks.float_tensor(op, "uncond_hidden", uncond_hidden, like=hidden)
        _checks.shape(op, "uncond_hidden", uncond_hidden, tuple(hidden.shape), "(…, D)")
    logits = hidden.detach().new_empty(()).expand(*hidden.shape[:-1], vocab)  # all that checks look at: a shape
    _, key, *per_row, exclude, bitmask, _, cfg_scale, _, _, _, _ = arguments(
        op, logits, temperature, num_samples, top_k, top_p, min_p, exclude, bitmask, None, cfg_scale, None, method, key,
        generator, row_offset,
    )  # fmt: skip
    x = _checks.matrix(hidden.detach())
    guide = None if uncond_hidden is None else _checks.matrix(uncond_hidden.detach())
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    n, by_vocab = x.shape[0], method == "race" and top_k is None and top_p is None and min_p is None
    shape = hidden.shape[:-1] if num_samples is None else (*hidden.shape[:-1], num_samples)
    out = torch.empty((n, *shape[hidden.dim() - 1 :]), dtype=torch.int64, device=hidden.device)
    least = 1024 if by_vocab else vocab
    for start, stop, own, offset in _row_blocks(n, max(CHUNK_BYTES // (4 * least), 1), key, row_offset):
        part = slice(start, stop)
        h, u, allowed = (None if m is None else m[part] for m in (x, guide, bitmask))
        options = [value if value is None or value.dim() == 0 else value[part] for value in per_row]
        assert h is not None
        if by_vocab:
            out[part] = _race(h, u, weight, bias, own, options[0], exclude, allowed, cfg_scale, num_samples, offset)
            continue
        rows, other = F.linear(h, weight, bias), None if u is None else F.linear(u, weight, bias)
        out[part] = call("categorical_sample", rows, own, *options, exclude, allowed, other, cfg_scale, None,
                         num_samples, method, offset)  # fmt: skip
    return out.reshape(shape)


def _race(
    x: Tensor,
    guide: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    key: Tensor,
    temperature: Tensor,
    exclude: Tensor | None,
    bitmask: Tensor | None,
    cfg_scale: float,
    num_samples: int | None,
    row_offset: int,
) -> Tensor:
    """Winners over chunks of the vocabulary; the state is one (score, token) a draw."""
    # 1024 divides a chunk: so do a Philox block's 4 tokens and a mask word's 32.
    width = max(CHUNK_BYTES // (4 * max(len(x), 1)) // 1024, 1) * 1024
    best: RaceWinner | None = None
    for start in range(0, weight.shape[0], width):
        part = slice(start, start + width)
        more = None if bias is None else bias[part]
        logits = F.linear(x, weight[part], more)
        other = None if guide is None else F.linear(guide, weight[part], more)
        words = None if bitmask is None else bitmask[:, start // 32 : start // 32 + (logits.shape[-1] + 31) // 32]
        here = RaceWinner(*call("categorical_race", logits, key, temperature, exclude, words, other, cfg_scale, None,
                                num_samples, row_offset, start))  # fmt: skip
        if best is None:
            best = here
            continue
        later = here.score > best.score  # of equal scores the lowest token stays
        best = RaceWinner(*(torch.where(later, a, b) for a, b in zip(here, best, strict=True)))
    assert best is not None
    # A row without an allowed token has score −inf, and token 0 as in categorical_sample.
    return best.tokens.where(best.score > -torch.inf, 0)


def _row_blocks(n: int, size: int, key: Tensor, row_offset: int) -> Iterator[tuple[int, int, Tensor, int]]:
    """Runs of rows with one rule of streams each: first, last, key and row offset."""
    if key.dim() == 0 or key.shape[0] == n:
        for start in range(0, n, size):
            stop = min(start + size, n)
            yield (
                (start, stop, key, row_offset + start) if key.dim() == 0 else (start, stop, key[start:stop], row_offset)
            )
        return
    run = n // key.shape[0]
    for g in range(key.shape[0]):
        for start in range(0, run, size):
            yield g * run + start, g * run + min(start + size, run), key[g], row_offset + start
