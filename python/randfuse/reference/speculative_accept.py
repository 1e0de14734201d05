"""Reference of `speculative_accept`: the rules in float64 on whole laws, one request after the other."""

from __future__ import annotations

import math
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from . import streams
from .categorical_sample import allowed_logits, draw_cdf, filtered, race_scores

NAN, POS_INF, NO_SUPPORT, BAD_ID = 1, 2, 4, 8  # bits of the status


class Law(NamedTuple):
    """The law of one place: (V,) float64 probabilities, all 0 without support, and what was wrong with its row."""

    p: Tensor
    log_p: Tensor
    scores: Tensor  # z / T of what can be drawn
    status: int
    soft: bool  # neither greedy nor forced by +inf, nor empty


def law_of(z: Tensor, t: float, filters: tuple[Tensor | None, ...] = (None,) * 3, saved: float = math.nan) -> Law:
    """softmax(z / t) of what the filters leave; a finite `saved` is the log-sum-exp to use."""
    nan = bool(z.isnan().any())
    z = z.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    top, best = z.max(-1)  # lowest index among equals
    point = torch.zeros_like(z).scatter(-1, best, 0.0 if top == -torch.inf else 1.0)
    status = nan * NAN | bool(top == torch.inf) * POS_INF | bool(top == -torch.inf) * NO_SUPPORT
    if not top.isfinite():
        return Law(point, torch.full_like(z, 0.0 if top > 0 else torch.nan), z, status, False)
    warm = t or 1.0
    x = filtered(((z - top) / warm).unsqueeze(0), *filters).squeeze(0)
    known = t > 0 and math.isfinite(saved)
    log_p = x - (saved - top / warm if known else x.exp().sum().log())
    return Law(log_p.exp() if t else point, log_p, (z / warm).where(x > -torch.inf, -torch.inf),
               0 if known else status, t > 0)  # fmt: skip


def target_laws(
    logits: Tensor, rows: Tensor, bitmask: Tensor | None, t: float, filters: tuple[Tensor | None, ...],
    saved: Tensor | None,
) -> list[Law]:  # fmt: skip
    """Those of some rows."""
    masks = None if bitmask is None else bitmask.reshape(-1, bitmask.shape[-1])
    z = allowed_logits(logits, rows, None, masks, None, 0.0)
    lse = z.new_full((len(z),), torch.nan) if saved is None else saved.reshape(-1)[rows]
    return [law_of(row, t, filters, known) for row, known in zip(z, lse.tolist(), strict=True)]


def draft_laws(
    logits: Tensor, n: int, count: int, draft_to_target: Tensor | None, vocab: int, t: float, saved: Tensor | None
) -> list[Law]:
    """Those of the first drafts of request n, over the target's tokens."""
    z = logits[n, :count].to(streams.sum_dtype(logits)).double()
    lse = z.new_full((count,), torch.nan) if saved is None else saved[n, :count]
    return [law_of(over_targets(row, draft_to_target, vocab, t), t, saved=known)
            for row, known in zip(z, lse.tolist(), strict=True)]  # fmt: skip


def over_targets(z: Tensor, draft_to_target: Tensor | None, vocab: int, t: float) -> Tensor:
    """Draft logits over the target's tokens: those of one token add up at temperature t, other tokens have −inf."""
    if draft_to_target is None:
        return z
    out = torch.full((vocab,), -torch.inf, dtype=z.dtype, device=z.device)
    for c, v in enumerate(draft_to_target.tolist()):
        out[v] = torch.logaddexp(out[v] / t, z[c] / t) * t
    return out


def point_laws(ids: list[int], like: Tensor) -> list[Law]:
    """The laws of drafts that were certain."""
    x = torch.tensor(ids, device=like.device).unsqueeze(-1)
    return [Law(row, like, like, 0, False) for row in like.new_zeros(len(ids), len(like)).scatter(-1, x, 1.0)]


class Noise(NamedTuple):
    """The words of one request; `position` is None without places in the text."""

    key: Tensor
    row: Tensor
    position: int | None

    def step_key(self) -> Tensor:
        """Of all that belongs to the start of the step."""
        place = self.position
        return self.key if place is None else streams.fold_in(self.key, torch.full_like(self.key, place))

    def coin(self, j: int) -> float:
        """u_j in [0, 1)."""
        low, high, *_ = streams.block(self.step_key(), self.row, j, op=streams.ACCEPT_COIN, width=32, sample=0)
        return float((high << 21) | (low >> 11)) * 2.0**-53

    def draw(self, weights: Tensor) -> int:
        return int(draw_cdf(weights.log().unsqueeze(0), self.step_key(), self.row, 0, op=streams.RESIDUAL))

    def race(self, law: Law, j: int) -> int:
        """The draw of mode match, whose noise belongs to the place in the text."""
        place = torch.full_like(self.key, (self.position or 0) + j)
        return int(race_scores(law.scores.unsqueeze(0), streams.fold_in(self.key, place), self.row, 0).argmax())


def is_likely(law: Law, x: int, threshold: float, alpha: float) -> bool:
    """p(x) > min(threshold, alpha exp(−H)) (Cai et al. 2024)."""
    entropy = -float((law.p * law.log_p.clamp(min=-800)).sum())
    return float(law.p[x]) > min(threshold, alpha * math.exp(-entropy))


def block_stop(p: list[Law], q: list[Law], ids: list[int], u: list[float]) -> tuple[int, float]:
    """max {i : u_i < h_i} and w there (Sun et al. 2024): w_i = min(1, w p/q), h_i = Z / (Z + 1 − w_i), h_K = w_K."""
    w, stop = [1.0], (0, 1.0)
    for i, x in enumerate(ids, 1):
        px, qx = float(p[i - 1].p[x]), float(q[i - 1].p[x])
        w.append(0.0 if px == 0 or w[-1] == 0 else min(1.0, w[-1] * px / qx) if qx > 0 else 1.0)
        z = float((w[i] * p[i].p - q[i].p).clamp(min=0).sum()) if i < len(ids) else 0.0
        whole = z + (1 - w[i])
        h = w[i] if i == len(ids) else z / whole if whole > 0 else 1.0
        if u[i - 1] < h:
            stop = (i, w[i])
    return stop


def verify(
    p: list[Law], q: list[Law], ids: list[int], noise: Noise, mode: str, typical: tuple[float, float]
) -> tuple[int, int]:
    """The number of drafts that stand, and the token after them."""
    w = 1.0

    def stands(j: int, x: int) -> bool:
        if p[j].soft and mode == "match":
            return noise.race(p[j], j) == x
        if p[j].soft and mode == "typical":
            return is_likely(p[j], x, *typical)
        return noise.coin(j) * float(q[j].p[x]) < float(p[j].p[x])  # Leviathan et al., Chen et al. 2023

    if mode == "block" and blockwise(p, q, ids):
        stop, w = block_stop(p, q, ids, [noise.coin(j) for j in range(len(ids))])
    else:
        stop = next((j for j, x in enumerate(ids) if not stands(j, x)), len(ids))
    law = p[stop]
    if not law.p.any():
        return stop, 0
    if mode == "match" and law.soft:
        return stop, noise.race(law, stop)
    fell = stop < len(ids) and mode in ("token", "block")
    left = (w * law.p - q[stop].p).clamp(min=0) if fell else law.p
    return stop, noise.draw(left if left.any() else law.p)


def blockwise(p: list[Law], q: list[Law], ids: list[int]) -> bool:
    """Whether all laws are soft, which those of one-hot drafts are not: else places are taken one by one."""
    return len(ids) > 0 and all(law.soft for law in (*p[: len(ids)], *q))


def seen_status(p: list[Law], q: list[Law], ids: list[int], stop: int, mode: str) -> int:
    """Bits of the rows that were looked at: those up to the stop, in mode block those of all drafts."""
    laws = [*p[: stop + 1], *(law for j, law in enumerate(q[: stop + 1]) if p[j].soft)]
    if mode == "block" and blockwise(p, q, ids):
        laws += [*p[: len(ids)], *q]
    return reduce(or_, (law.status for law in laws))


def leading_ids(given: list[int], vocab: int) -> tuple[list[int], int]:
    """The drafts before the first id that is none, and BAD_ID if that is not -1."""
    end = next((j for j, x in enumerate(given) if not 0 <= x < vocab), len(given))
    return given[:end], BAD_ID * (end < len(given) and given[end] != -1)


def speculative_accept(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    key: Tensor,
    draft_logits: Tensor | None,
    num_drafts: Tensor | None,
    cu_num_logits: Tensor | None,
    temperature: Tensor,
    draft_temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    bitmask: Tensor | None,
    mode: str,
    typical_threshold: float,
    typical_alpha: float,
    draft_logsumexp: Tensor | None,
    target_logsumexp: Tensor | None,
    draft_to_target: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, number accepted, logprobs, status; see `ops.speculative_accept`."""
    (b, k), vocab, device = draft_token_ids.shape, target_logits.shape[-1], target_logits.device
    keys, stream_rows = streams.row_keys(key, b)
    cu = (k + 1) * torch.arange(b + 1) if cu_num_logits is None else cu_num_logits
    counts = (cu.diff() - 1 if num_drafts is None else num_drafts).tolist()
    t = temperature.expand(b).tolist()
    t_draft = t if draft_temperature is None else draft_temperature.expand(b).tolist()
    saved = None if mode == "typical" else target_logsumexp
    tokens = draft_token_ids.new_full((b, k + 1), -1)
    logprobs = torch.zeros(b, k + 1, dtype=torch.float64, device=device)
    accepted, status = tokens.new_zeros(b), tokens.new_zeros(b)
    for n in range(b):
        if counts[n] < 0:  # packed, and without rows
            continue
        ids, bad = leading_ids(draft_token_ids[n, : counts[n]].tolist(), vocab)
        rows = torch.arange(len(ids) + 1, device=device) + cu[n].to(device)
        filters = tuple(f if f is None else f.to(device).expand(b)[n : n + 1] for f in (top_k, top_p, min_p))
        p = target_laws(target_logits, rows, bitmask, t[n], filters, saved)
        q = point_laws(ids, p[0].scores)
        if draft_logits is not None and mode in ("token", "block") and t[n] > 0 and t_draft[n] > 0:
            q = draft_laws(draft_logits, n, len(ids), draft_to_target, vocab, t_draft[n], draft_logsumexp)
        noise = Noise(keys[n : n + 1], stream_rows[n : n + 1], None if positions is None else int(positions[n]))
        stop, token = verify(p, q, ids, noise, mode, (typical_threshold, typical_alpha))
        emitted = [*ids[:stop], token]
        tokens[n, : stop + 1] = torch.tensor(emitted, device=device)
        logprobs[n, : stop + 1] = torch.stack([law.log_p[x] for law, x in zip(p[: stop + 1], emitted, strict=True)])
        accepted[n], status[n] = stop, seen_status(p, q, ids, stop, mode) | bad * (stop == len(ids))
    return tokens, accepted, logprobs.to(streams.sum_dtype(target_logits)), status
