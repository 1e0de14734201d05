"""`dropout` and `dropout_mask`: the annotated exemplar. A new op copies the four parts of this file.

1. public function: validate, settle the key, short-cut the identity, one `call`;
2. fake: the shape and strides that the kernels really return;
3. derivative, written with ops that are differentiable themselves;
4. batching rule for vmap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks, keys
from .._backends import call, rate
from .._registry import rules
from ..reference import streams

# --- 1. public functions -------------------------------------------------------------------------------------------


def dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Zero each element with probability p and scale the kept ones so that the mean is exactly that of x.

    Equivalent to: ``torch.where(dropout_mask((rows, cols), p, key=key).view_as(x), x / (1 - effective_p(p)), 0)``

    Neither the mask nor x is kept for backward: the key is, 8 bytes. A dropped NaN or inf becomes 0.

    Args:
        x: (…, cols), float32, float16, bfloat16 or (on the CPU) float64, any strides; seen as (rows, cols).
        p: probability of zeroing, a float or a 0-d tensor. Only a tensor is free of recompilation. p=0 returns x
            itself and draws nothing, p=1 returns zeros. A tensor on a GPU cannot raise without a sync: there it is
            clamped to [0, 1], NaN counting as 0. p gets no gradient.
        training: False returns x.
        key: int64 () or (G,); G must divide the rows, and run r of rows/G rows reads key r (see `randfuse.key`).
            None draws one from `generator` or torch's default generator.
        row_offset, col_offset: place of x in a larger matrix, in elements: a shard gets its part of the whole mask.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, probability, key or offset, named in the message.

    Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014.

    >>> x = torch.ones(2, 4)
    >>> k = randfuse.key(0)
    >>> torch.equal(dropout(x, 0.5, key=k), 2 * dropout_mask((2, 4), 0.5, key=k))
    True
    """
    _checks.float_tensor("dropout", "x", x)
    _checks.probability("dropout", p, x.device)
    rows, cols = _checks.rows_cols(x.shape)
    _checks.stream_range("dropout", rows, cols, row_offset, col_offset)
    keys.check("dropout", key, generator, rows, x.device)
    if not training or (not isinstance(p, Tensor) and p == 0):
        return x
    key = keys.resolve(key, generator, x.device)
    return call("dropout", x, key, *rate(p), streams.DROPOUT, 0, row_offset, col_offset)


def dropout_mask(
    shape: tuple[int, int], p: float | Tensor, *, key: Tensor, sample: int = 0, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """The mask of `dropout` and `dropout_linear` for a (rows, cols) input: bool, True = kept, on the key's device.

    Equivalent to: ``lanes(key, rows, cols) >= round(p * 65536)`` with the 16-bit lanes of docs/streams.md.

    Args:
        shape: (rows, cols).
        p: as in `dropout`.
        key: int64 () or (G,), G dividing the rows.
        sample: which of the independent masks of a multi-sample head; plain dropout is sample 0.
        row_offset, col_offset: as in `dropout`.

    Raises:
        TypeError, ValueError: as in `dropout`.

    >>> whole = dropout_mask((6, 20), 0.3, key=randfuse.key(1))
    >>> torch.equal(whole[2:5, 3:9], dropout_mask((3, 6), 0.3, key=randfuse.key(1), row_offset=2, col_offset=3))
    True
    """
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"dropout_mask: shape must be two sizes (rows, cols), got {type(shape).__name__}")
    if len(shape) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) or n < 0 for n in shape):
        raise ValueError(f"dropout_mask: shape must be two sizes (rows, cols), got {tuple(shape)}")
    rows, cols = shape
    device = key.device if isinstance(key, Tensor) else torch.device("cpu")
    _checks.probability("dropout_mask", p, device)
    _checks.stream_range("dropout_mask", rows, cols, row_offset, col_offset, sample)
    _checks.key_tensor("dropout_mask", key, rows, device)
    return call("dropout_mask", key, [rows, cols], *rate(p), streams.DROPOUT, sample, row_offset, col_offset)


# --- 2. fakes ------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, whatever the strides of x


def _mask_fake(key: Tensor, shape: list[int], *_: Any) -> Tensor:
    return key.new_empty(shape, dtype=torch.bool)


# --- 3. derivative -------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, key, p, p_tensor, *place = inputs
    ctx.save_for_backward(key, p_tensor)
    ctx.p, ctx.place = p, place


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    key, p_tensor = ctx.saved_tensors
    # Dropout is linear and self-adjoint: its derivative is itself.
    return call("dropout", grad, key, ctx.p, p_tensor, *ctx.place), *[None] * 7


# --- 4. batching ---------------------------------------------------------------------------------------------------


def batch_keys(key: Tensor, key_dim: int | None, size: int) -> Tensor:
    """Keys (size·G,) of `size` batch elements: one shared key means the same mask for each, a batch of keys its own."""
    key = key.expand(size, *key.shape) if key_dim is None else key.movedim(key_dim, 0)
    return key.reshape(-1) if size else key.new_zeros(())


def refuse_batched_p(op: str, p_dim: int | None) -> None:
    if p_dim is not None:
        raise ValueError(f"{op}: p must be the same for the whole batch under vmap, got a batched tensor")


def _vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, key: Tensor, p: float, p_tensor: Tensor | None, *place: int
) -> Any:
    refuse_batched_p("dropout", in_dims[3])
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    keys_ = batch_keys(key, in_dims[1], info.batch_size)
    rows, cols = _checks.rows_cols(x.shape[1:])  # a 0-d element is one row of one column
    flat = x.reshape(info.batch_size * rows, cols)
    return call("dropout", flat, keys_, p, p_tensor, *place).reshape(x.shape), 0


def _mask_vmap(
    info: Any, in_dims: tuple[Any, ...], key: Tensor, shape: list[int], p: float, p_tensor: Tensor | None, *place: int
) -> Any:
    refuse_batched_p("dropout_mask", in_dims[3])
    keys_ = batch_keys(key, in_dims[0], info.batch_size)
    mask = call("dropout_mask", keys_, [info.batch_size * shape[0], shape[1]], p, p_tensor, *place)
    return mask.reshape(info.batch_size, *shape), 0


rules("dropout", _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
rules("dropout_mask", _mask_fake, vmap=_mask_vmap)
