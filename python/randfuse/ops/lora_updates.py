"""`lora_updates`: what several low-rank adapters of one x add to their layers (q, k, v), from one read of x.

Composed of the ops of one adapter and of `multi_sample_linear`, so it has no reference, binding or kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _autocast, _checks, keys
from .._backends import call, rate

MASKS = ("own", "shared")


def lora_updates(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
    p: float | Tensor = 0.0,
    training: bool = True,
    *,
    masks: str = "own",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> tuple[Tensor, ...]:
    """The updates of several adapters of one x, without the base products they are added to.

    Equivalent to: ``[scaling * F.linear(F.linear(dropout(x, p), a), b) for a, b in zip(lora_a, lora_b)]``

    With q, k and v as base layers: ``q, k, v = (base(x) + u for base, u in zip((q, k, v), lora_updates(x, …)))``. For
    one adapter of one layer `lora_linear` is the better form: it adds in place.

    x is read once, and neither a mask nor a dropped x is stored. Two cases read it once for each adapter: float32
    factors beside a 16-bit x, and masks="own" with different ranks.

    Args:
        x: (…, K), float32, float16, bfloat16 or (on the CPU) float64; under autocast x is cast like in `F.linear`.
        lora_a: P factors (r, K), all of x's dtype or all float32; ranks may differ.
        lora_b: P factors (N, r), of the dtype of lora_a; N may differ.
        scaling: factor of the adapters, one for all or P of them.
        p, training, key, generator: as in `dropout`.
        masks: "own": adapter i has ``dropout_mask((rows, K), p, key=key, sample=i)``, as PEFT has independent masks and
            as `lora_linear(sample=i)` has this one; "shared": all have that of sample 0.
        row_offset, col_offset: place of x in a larger (rows, K) matrix, in elements.

    Returns:
        P updates (…, N), of the dtype of the factors; under autocast of that of `F.linear`.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, number of factors, probability, key or offset, named in the
            message.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv:2106.09685).

    >>> x, a, b = torch.ones(2, 4), torch.ones(1, 4), torch.ones(3, 1)
    >>> [u.tolist() for u in lora_updates(x[:1], [a, 2 * a], [b, b[:1]])]
    [[[4.0, 4.0, 4.0]], [[8.0]]]
    """
    op = "lora_updates"
    _checks.float_tensor(op, "x", x)
    (x,) = _autocast.autocast(x)
    scalings = scaling if isinstance(scaling, (list, tuple)) else [scaling] * len(lora_a)
    if not len(lora_a) == len(lora_b) == len(scalings) > 0:
        got = f"{len(lora_a)}, {len(lora_b)} and {len(scalings)}"
        raise ValueError(f"{op}: lora_a, lora_b and scaling must be for the same number of adapters, got {got}")
    for c in scalings:
        if isinstance(c, bool) or not isinstance(c, (int, float)):
            raise TypeError(f"{op}: scaling must be a number, or one for each adapter, got {type(c).__name__}")
    for name, factors in (("lora_a", lora_a), ("lora_b", lora_b)):  # before autocast would cast a wrong one
        for i, factor in enumerate(factors):
            _checks.float_tensor(op, f"{name}[{i}]", factor, like=x, dtype=False)
    if _autocast.enabled(x.device.type):
        lora_a, lora_b = ([t if t.dtype == torch.float32 else t.to(x.dtype) for t in f] for f in (lora_a, lora_b))
    _factors(op, x, lora_a, lora_b)
    if masks not in MASKS:
        raise ValueError(f"{op}: masks must be 'own' or 'shared', got {masks!r}")
    _checks.probability(op, p, x.device)
    rows, cols = _checks.rows_cols(x.shape)
    _checks.stream_range(op, rows, cols, row_offset, col_offset)
    keys.check(op, key, generator, rows, x.device)
    if training and (isinstance(p, Tensor) or p != 0):
        key = keys.resolve(key, generator, x.device)
    else:  # the key is not looked at, and all may share the undropped x
        p, masks, key = 0.0, "shared", torch.zeros((), dtype=torch.int64, device=x.device)
    down = _down(x, lora_a, masks, key, *rate(p), row_offset, col_offset)
    return tuple(F.linear((s * c).to(b.dtype), b) for s, c, b in zip(down, scalings, lora_b, strict=True))


def _down(
    x: Tensor,
    lora_a: Sequence[Tensor],
    masks: str,
    key: Tensor,
    p: float,
    p_tensor: Tensor | None,
    row_offset: int,
    col_offset: int,
) -> Sequence[Tensor]:
    """The products D(x) Aᵀ (…, r). Which op computes them: what reads x once, and does not round float32 factors."""
    place = row_offset, col_offset
    ranks, one_dtype = [a.shape[0] for a in lora_a], lora_a[0].dtype == x.dtype
    if masks == "shared" or len(ranks) == 1:
        together = torch.cat(tuple(lora_a))
        if one_dtype:
            return call("dropout_linear", x, together, None, key, p, p_tensor, *place).split(ranks, -1)
        return call("lora_linear_down", x, together, key, p, p_tensor, 0, *place).split(ranks, -1)
    if one_dtype and len(set(ranks)) == 1:
        stacked = torch.stack(tuple(lora_a))
        return call("multi_sample_linear", x, stacked, None, key, len(ranks), p, p_tensor, *place).unbind(0)
    return [call("lora_linear_down", x, a, key, p, p_tensor, sample, *place) for sample, a in enumerate(lora_a)]


def _factors(op: str, x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> None:
    """lora_a[i] (r, K) and lora_b[i] (N, r), all of x's dtype or all float32."""
    wanted = torch.float32 if lora_a[0].dtype == torch.float32 and x.dtype != torch.float64 else x.dtype
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        for name, factor in ((f"lora_a[{i}]", a), (f"lora_b[{i}]", b)):
            if factor.dtype != wanted:
                raise TypeError(f"{op}: {name} must be {wanted}, got {factor.dtype}")
        if a.dim() != 2 or x.dim() == 0 or a.shape[1] != x.shape[-1]:
            raise ValueError(f"{op}: lora_a[{i}] must have shape (r, K) with x (…, K), got {tuple(a.shape)}")
        if b.dim() != 2 or b.shape[1] != a.shape[0]:
            raise ValueError(f"{op}: lora_b[{i}] must have shape (N, r={a.shape[0]}), got {tuple(b.shape)}")
