"""`speculative_accept`: which drafted tokens stand, and the token after them, from raw logits in one call."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _sampling, keys
from .._backends import call
from .._registry import rules

MODES = ("token", "block", "match", "typical")


class Accepted(NamedTuple):
    """What a step of speculative decoding emits; see `speculative_accept`."""

    tokens: Tensor
    num_accepted: Tensor
    logprobs: Tensor
    status: Tensor


def speculative_accept(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_logits: Tensor | None = None,
    *,
    num_drafts: Tensor | None = None,
    cu_num_logits: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    draft_temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    bitmask: Tensor | None = None,
    mode: Literal["token", "block", "match", "typical"] = "token",
    typical_threshold: float = 0.09,
    typical_alpha: float = 0.3,
    draft_logsumexp: Tensor | None = None,
    target_logsumexp: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    positions: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Accepted:
    """Verify K drafted tokens a request against the target model: what is emitted has the target's law exactly.

    Equivalent to: ``p, q = (t / temperature).softmax(-1), (d / temperature).softmax(-1)``, then, a request: accept
    x while ``u * q[j, x] < p[j, x]``; where that first fails draw from ``(p[j] - q[j]).clamp(min=0)``, after the last
    draft from ``p[K]``. Here no softmax is stored, and on the CPU no row after the stop is read.

    Modes. All but "typical" leave the law of the target untouched.

    * "token": the rule above (Leviathan et al., Chen et al.).
    * "block": block verification (Sun et al.); emits at least as many tokens in the mean, and reads all rows.
    * "match": the target's own draw, by race, is compared with the draft. With `positions`, tokens do not depend on the
      drafts, their number or law: they are ``categorical_sample(row, method="race", key=fold_in(key, position))``, so
      a text is the same with and without speculation. A drafter that samples that way with the same key agrees often.
    * "typical": Medusa's rule, p(x) > min(typical_threshold, typical_alpha · exp(−entropy of p)); where it fails a draw
      from p follows. **Lossy**: it changes the law of the text, in favour of longer accepts.

    Drafts without logits, or with draft_temperature 0, are one-hot: x was certain. Then a draft stands with p(x), and
    block equals token. Temperature 0 takes the largest logit, whatever the mode.

    Args:
        target_logits: (B, K+1, V), or (rows, V) with `cu_num_logits`; row j is the law of the token after j drafts.
            V up to 2**20, float32, float16, bfloat16 or (on the CPU) float64; rows may have any strides.
        draft_token_ids: int64 (B, K), ids of the target's vocabulary. −1 ends a request's drafts.
        draft_logits: (B, K, V) of the same dtype: the logits that draft j was drawn from. None: one-hot drafts.
        num_drafts: int64 (B,), how many drafts each request has; None: K, or what cu_num_logits says.
        cu_num_logits: int64 (B+1,), request b has rows cu[b] … cu[b+1]−1 of target_logits, one more than drafts. One
            without rows emits nothing.
        temperature, top_k, top_p, min_p: of the target, as in `categorical_sample`; numbers or tensors () or (B,).
        draft_temperature: of the draft, default `temperature`. Filters of the draft belong into its logits, as −inf.
        bitmask: int32, allowed tokens of each row of target_logits, shape as theirs with ⌈V/32⌉ for V.
        draft_logsumexp, target_logsumexp: floating, (B, K) and the shape of target_logits' rows: log-sum-exp of the
            tempered (and masked) rows, as `categorical_sample_with_stats` returns them; their rows then are read at
            the stop only. Values that are not finite are ignored. The target's goes without top_k, top_p and min_p.
        draft_to_target: int64 (V_draft,), the token each draft logit belongs to; draft_logits is (B, K, V_draft) then.
            Several of one token add up, tokens of none have q = 0.
        positions: int64 (B,), place in the text of the step's first draft. Lets one key serve all steps; without it,
            every step needs a fresh key. Draw draft j of the step under ``fold_in(fold_in(key, position), j)``: mode
            "block" has looked at drafts beyond its stop, so no later step may draw from their words. For coupled
            drafts of mode "match", and only there, it is ``fold_in(key, position + j)``.
        key: int64 () or (G,); G must divide B. A request's tokens depend on its key (and, where keys are shared, on its
            index among those that share it) and on its own rows, not on K, padding or other requests. None draws one.

    Returns:
        Named tuple of tokens int64 (B, K+1), padded with −1; num_accepted int64 (B,), one less than the tokens emitted;
        logprobs (B, K+1), float32 or float64, log p of each token under the filtered target (at temperature 0, of
        temperature 1), 0 where padded; status int64 (B,), 0 or bits of what the rows up to the stop (mode block: all
        rows) showed: 1 a NaN, 2 +inf, 4 no logit above −inf, 8 a draft id outside [−1, V), which ends the drafts.
        A NaN counts as −inf, the first +inf of a row wins, and a row without support gives token 0, whose logprob is
        NaN. Such a row stops the request or forces its token; others are untouched.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, value or id, named in the message. Values of tensors are
            checked where they can be read, on the CPU.

    Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023; Chen et al., "Accelerating
    Large Language Model Decoding with Speculative Sampling", 2023 (arXiv 2302.01318); Sun et al., "Block Verification
    Accelerates Speculative Decoding", 2024 (arXiv 2403.10444); Cai et al., "Medusa", 2024 (arXiv 2401.10774).

    >>> target = torch.tensor([[[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])
    >>> speculative_accept(target, torch.tensor([[1, 2]]), temperature=0.0).tokens
    tensor([[ 1,  0, -1]])
    """
    op = "speculative_accept"
    _checks.float_tensor(op, "target_logits", target_logits)
    device = target_logits.device
    _sampling.integers(op, "draft_token_ids", draft_token_ids, torch.int64, device)
    if draft_token_ids.dim() != 2:
        raise ValueError(f"{op}: draft_token_ids must have shape (B, K), got {tuple(draft_token_ids.shape)}")
    b, k = draft_token_ids.shape
    rows = _rows(op, target_logits, b, k, cu_num_logits, num_drafts)
    vocab = target_logits.shape[-1]
    keys.check(op, key, generator, b, device)
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be {', '.join(map(repr, MODES[:-1]))} or 'typical', got {mode!r}")
    for name, value in (("typical_threshold", typical_threshold), ("typical_alpha", typical_alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{op}: {name} must be a number, at least 0, got {value!r}")
    parameters = _sampling.parameters(op, (b,), device, temperature, top_k, top_p, min_p)
    if draft_temperature is not None:
        draft_temperature = _sampling.temperatures(op, "draft_temperature", draft_temperature, (b,), device)
    if bitmask is not None:
        _sampling.integers(op, "bitmask", bitmask, torch.int32, device)
        _checks.shape(op, "bitmask", bitmask, (*rows, (vocab + 31) // 32), "(…, ⌈V/32⌉)")
    draft_logits = _draft(op, target_logits, draft_logits, draft_to_target, b, k)
    if target_logsumexp is not None and any(f is not None for f in (top_k, top_p, min_p)):
        raise ValueError(f"{op}: target_logsumexp must be None with top_k, top_p or min_p, got both")
    for name, saved, shape, letters in (
        ("target_logsumexp", target_logsumexp, rows, "(…)"),
        ("draft_logsumexp", draft_logsumexp, (b, k), "(B, K)"),
    ):
        if saved is not None:
            _checks.float_tensor(op, name, saved, like=target_logits, dtype=False)
            _checks.shape(op, name, saved, shape, letters)
    if positions is not None:
        _sampling.integers(op, "positions", positions, torch.int64, device)
        _checks.shape(op, "positions", positions, (b,), "(B,)")
    key = keys.resolve(key, generator, device)
    saved_rows = (s if s is None else s.detach() for s in (draft_logsumexp, target_logsumexp))
    return Accepted(
        *call(op, target_logits.detach(), draft_token_ids, key, draft_logits, num_drafts, cu_num_logits, parameters[0],
              draft_temperature, *parameters[1:], bitmask, mode, float(typical_threshold), float(typical_alpha),
              *saved_rows, draft_to_target, positions)
    )  # fmt: skip


def _rows(op: str, logits: Tensor, b: int, k: int, cu: Tensor | None, num_drafts: Tensor | None) -> tuple[int, ...]:
    """Shape of the target's rows, once it and what makes requests ragged are checked."""
    want = "(B, K+1, V)" if cu is None else "(rows, V)"
    if logits.dim() != want.count(",") + 1 or not 1 <= logits.shape[-1] <= _sampling.MAX_VOCAB:
        raise ValueError(f"{op}: target_logits must have shape {want} with V in [1, 2**20], got {tuple(logits.shape)}")
    if cu is None and tuple(logits.shape[:2]) != (b, k + 1):
        raise ValueError(f"{op}: target_logits must have shape (B, K+1, V) = {(b, k + 1, logits.shape[-1])}, "
                         f"got {tuple(logits.shape)}")  # fmt: skip
    if cu is not None:
        if num_drafts is not None:
            raise ValueError(f"{op}: num_drafts must be None with cu_num_logits, got both")
        _sampling.integers(op, "cu_num_logits", cu, torch.int64, logits.device)
        _checks.shape(op, "cu_num_logits", cu, (b + 1,), "(B+1,)")
        rise = cu.diff()
        ends = (cu[0] >= 0) & (cu[-1] <= logits.shape[0])
        if _known(cu) and not bool(ends & ((rise >= 0) & (rise <= k + 1)).all()):
            raise ValueError(f"{op}: cu_num_logits must rise by 0 … K+1 = {k + 1} a request within the "
                             f"{logits.shape[0]} rows, got {cu.tolist()}")  # fmt: skip
    if num_drafts is not None:
        _sampling.integers(op, "num_drafts", num_drafts, torch.int64, logits.device)
        _checks.shape(op, "num_drafts", num_drafts, (b,), "(B,)")
        if _known(num_drafts) and not bool(((num_drafts >= 0) & (num_drafts <= k)).all()):
            raise ValueError(f"{op}: num_drafts must be in [0, K] = [0, {k}], got {num_drafts.tolist()}")
    return tuple(logits.shape[:-1])


def _draft(
    op: str, target: Tensor, logits: Tensor | None, draft_to_target: Tensor | None, b: int, k: int
) -> Tensor | None:
    if logits is None:
        if draft_to_target is not None:
            raise ValueError(f"{op}: draft_to_target must be None without draft_logits, got a Tensor")
        return None
    width, vocab = target.shape[-1], target.shape[-1]
    if draft_to_target is not None:
        _sampling.integers(op, "draft_to_target", draft_to_target, torch.int64, target.device)
        if draft_to_target.dim() != 1:
            raise ValueError(f"{op}: draft_to_target must have one dimension, got {tuple(draft_to_target.shape)}")
        width = draft_to_target.shape[0]
        if _known(draft_to_target) and not bool(((draft_to_target >= 0) & (draft_to_target < vocab)).all()):
            raise ValueError(f"{op}: draft_to_target must be in [0, {vocab}), got ids outside")
    _checks.float_tensor(op, "draft_logits", logits, like=target)
    _checks.shape(op, "draft_logits", logits, (b, k, width), "(B, K, V)")
    return logits.detach()


def _known(x: Tensor) -> bool:
    return x.device.type == "cpu" and _sampling.readable(x)


def _fake(target_logits: Tensor, draft_token_ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    b, k = draft_token_ids.shape
    wide = torch.float64 if target_logits.dtype == torch.float64 else torch.float32
    ints = [target_logits.new_empty(shape, dtype=torch.int64) for shape in ((b, k + 1), (b,), (b,))]
    return ints[0], ints[1], target_logits.new_empty((b, k + 1), dtype=wide), ints[2]


rules("speculative_accept", _fake)
