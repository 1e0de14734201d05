"""What all steps share: which positions are masked, their random words, draws for rows that change and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .. import keys
from ..ops.categorical_sample import categorical_sample
from . import _words

if TYPE_CHECKING:
    from typing import Literal

Logits = Tensor | Callable[[Tensor], Tensor]


class Options(TypedDict, total=False):
    """Options of `randfuse.categorical_sample` that steps pass on; per-row tensors have shape (B, L)."""

    temperature: float | Tensor
    top_k: int | Tensor | None
    top_p: float | Tensor | None
    min_p: float | Tensor | None
    exclude: Tensor | None
    uncond_logits: Logits | None
    cfg_scale: float


class Sampling(Options, total=False):
    """The same with the way of drawing; `generate` has another method."""

    method: Literal["cdf", "race"]


class Step:
    """One step of a batch: its checked tokens, which of them are masked, and the random words it may read.

    A token at position l is drawn with a key of its own, fold_in(key of the sequence, step·2³² + l), so it depends
    neither on the batch, nor on the length, nor on which other rows are sampled.
    """

    def __init__(
        self,
        op: str,
        tokens: Tensor,
        mask_id: int | None,
        step: int | Tensor,
        window: Tensor | None,
        key: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        check_tokens(op, tokens, 0 if mask_id is None else mask_id)
        mask_of(op, "window", window, tokens)
        self.op, self.tokens, self.mask_id = op, tokens, mask_id
        self.window = torch.ones_like(tokens, dtype=torch.bool) if window is None else window
        self.masked = self.window & (tokens == mask_id) if mask_id is not None else torch.zeros_like(self.window)
        self.keys = sequence_keys(op, key, generator, tokens)
        self.step = _step_number(op, step, tokens)

    def coins(self, domain: int, p: Tensor) -> Tensor:
        """Bool (B, L), each True with its probability p (float64, broadcasts)."""
        return _words.coin(self.words(domain), p)

    def words(self, domain: int) -> Tensor:
        return _words.words(self.keys, domain, self.step, self.tokens.shape[1])

    def reveal(self, logits: Logits, where: Tensor, sampling: Sampling) -> Tensor:
        """The tokens with fresh draws where `where` is True; nothing is sampled elsewhere."""
        rows = where.flatten().nonzero().squeeze(-1)
        return self.put(rows, self.draw(logits, rows, sampling))

    def put(self, rows: Tensor, values: Tensor) -> Tensor:
        """The tokens with `values` (R,) at the flattened positions `rows`."""
        return self.tokens.flatten().index_put((rows,), values).view_as(self.tokens)

    def draw(self, logits: Logits, rows: Tensor, sampling: Sampling, num_samples: int | None = None) -> Tensor:
        """Tokens of rows (R,) of the flattened positions, (R,) or (R, M)."""
        if none_of(rows):  # nothing to ask a model for
            return rows.new_empty(rows.shape if num_samples is None else (0, num_samples))
        x, arguments = self.arguments(logits, rows, sampling)
        return categorical_sample(x, num_samples=num_samples, **arguments)

    def arguments(self, logits: Logits, rows: Tensor, sampling: Sampling) -> tuple[Tensor, dict[str, Any]]:
        """Logits (R, V) where a function gives them, else all of them and `rows`; the tokens are the same."""
        batch, length = self.tokens.shape
        sequence, position = rows // length, rows % length
        key = keys.fold_in(self.keys[sequence], (self.step.expand(batch)[sequence] << 32) | position)
        arguments: dict[str, Any] = dict(sampling)
        if callable(logits):
            x = _matrix(self.op, "logits", logits(rows), (rows.numel(),))
            for name, value in arguments.items():  # per-row options of all positions
                if isinstance(value, Tensor) and value.dim() == 2:
                    arguments[name] = value.expand(batch, length).reshape(-1)[rows]
        else:
            x = _matrix(self.op, "logits", logits, (batch, length))
            key = key.new_zeros(batch * length).index_put((rows,), key)
            arguments["rows"] = rows
        other = sampling.get("uncond_logits")
        if other is not None:
            if callable(other) != callable(logits):
                raise TypeError(f"{self.op}: uncond_logits must be a function exactly where logits is one")
            arguments["uncond_logits"] = other(rows) if callable(other) else other
        arguments["exclude"] = self._excluded(x.shape[-1], sampling.get("exclude"))
        return x, {**arguments, "key": key}

    def _excluded(self, vocab: int, more: Tensor | None) -> Tensor | None:
        """[MASK] is never drawn; where it is no token of the model's vocabulary there is nothing to exclude."""
        if self.mask_id is None or self.mask_id >= vocab:
            return more
        mask = torch.full((1,), self.mask_id, dtype=torch.int64, device=self.tokens.device)
        return mask if more is None else torch.cat([mask, more])


def check_tokens(op: str, tokens: object, mask_id: object) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{op}: tokens must be a Tensor, got {type(tokens).__name__}")
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise ValueError(f"{op}: tokens must be int64 (B, L), got {tokens.dtype} {tuple(tokens.shape)}")
    if isinstance(mask_id, bool) or not isinstance(mask_id, int) or mask_id < 0:
        raise ValueError(f"{op}: mask_id must be an id, got {mask_id!r}")


def none_of(rows: Tensor) -> bool:
    """Whether there is nothing to do. A compiled graph has no size to look at, and does it for no rows."""
    return not torch.compiler.is_compiling() and rows.numel() == 0


def logit_of(x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """The logits of ids (R,) in rows, out of (R, V) or of all (B, L, V), as float32 or wider."""
    place = torch.arange(rows.numel(), device=rows.device) if x.dim() == 2 else rows
    value = x.reshape(-1, x.shape[-1])[place, ids]
    return value if value.dtype == torch.float64 else value.float()


def sequence_keys(op: str, key: Tensor | None, generator: torch.Generator | None, tokens: Tensor) -> Tensor:
    """One key a sequence: keys (B,) as they are; a key () stands for split(key, B)."""
    batch = tokens.shape[0]
    keys.check(op, key, generator, batch, tokens.device)
    key = keys.resolve(key, generator, tokens.device)
    if key.dim() == 0:
        return keys.fold_in(key, torch.arange(batch, device=key.device))
    if key.shape[0] != batch:
        raise ValueError(f"{op}: key must have shape () or (B,) = ({batch},), got {tuple(key.shape)}")
    return key


def mask_of(op: str, name: str, mask: object, tokens: Tensor) -> None:
    """A bool tensor of the shape of tokens, or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        raise ValueError(
            f"{op}: {name} must be bool (B, L) = {tuple(tokens.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if mask.device != tokens.device:
        raise ValueError(f"{op}: {name} must be on {tokens.device}, got {mask.device}")


def _step_number(op: str, step: int | Tensor, tokens: Tensor) -> Tensor:
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or (step.dim() and step.shape != tokens.shape[:1]):
            raise ValueError(f"{op}: step must be int64 () or (B,), got {step.dtype} {tuple(step.shape)}")
        return step
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"{op}: step must be an int or an int64 Tensor, got {type(step).__name__}")
    if not 0 <= step < 2**31:
        raise ValueError(f"{op}: step must be in [0, 2**31), got {step}")
    return torch.full((), step, dtype=torch.int64, device=tokens.device)


def _matrix(op: str, name: str, x: object, leading: tuple[int, ...]) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor or a function of rows, got {type(x).__name__}")
    if tuple(x.shape[:-1]) != leading:
        raise ValueError(f"{op}: {name} must have shape {(*leading, 'V')}, got {tuple(x.shape)}")
    return x
