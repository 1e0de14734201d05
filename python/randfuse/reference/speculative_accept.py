"""Reference of `speculative_accept`: the rules in float64 on whole laws, one request after the other."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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


def over_targets(z: Tensor, draft_to_target: Tensor | None, vocab: int, t: float) -> Tensor:
    """Draft logits over the target's tokens: those of one token add up at temperature t, other tokens have −inf."""
    if draft_to_target is None:
        return z
    out = torch.full((vocab,), -torch.inf, dtype=z.dtype, device=z.device)
    for c, v in enumerate(draft_to_target.tolist()):
        out[v] = torch.logaddexp(out[v] / t, z[c] / t) * t
    return out


def block_stop(p: list[Law], q: list[Law], ids: list[int], u: list[float]) -> tuple[int, float]:
    """max {i : u_i < h_i} and w there (Sun et al. 2024): w_i = min(1, w p/q), h_i = Z / (Z + 1 − w_i), h_K = w_K."""
    w, stop = [1.0], (0, 1.0)
    for i, x in enumerate(ids, 1):
        px, qx = float(p[i - 1].p[x]), float(q[i - 1].p[x])
        w.append(0.0 if px == 0 or w[-1] == 0 else min(1.0, w[-1] * px / qx) if qx > 0 else 1.0)
        z = float((w[i] * p[i].p - q[i].p).clamp(min=0).sum()) if i < len(ids) else 0.0
        whole = z + 1 - w[i]
        h = w[i] if i == len(ids) else z / whole if whole > 0 else 1.0
        if u[i - 1] < h:
            stop = (i, w[i])
    return stop


def verify(p: list[Law], q: list[Law], ids: list[int], key: Tensor, row: Tensor, position: int | None, mode: str,
           typical: tuple[float, float]) -> tuple[int, int]:  # fmt: skip
    """The number of drafts that stand, and the token after them."""
    here = key if position is None else streams.fold_in(key, torch.full_like(key, position))

    def drawn(weights: Tensor) -> int:
        return int(draw_cdf(weights.log().unsqueeze(0), here, row, 0, op=streams.RESIDUAL))

    def coin(j: int) -> float:
        low, high, *_ = streams.block(here, row, j, op=streams.ACCEPT_COIN, width=32, sample=0)
        return float((high << 21) | (low >> 11)) * 2.0**-53

    def stands(j: int, x: int) -> bool:
        if mode == "match" and p[j].soft:
            return raced(j) == x
        if mode == "typical" and p[j].soft:
            entropy = -float((p[j].p * p[j].log_p.clamp(min=-800)).sum())
            return float(p[j].p[x]) > min(typical[0], typical[1] * math.exp(-entropy))
        return coin(j) * float(q[j].p[x]) < float(p[j].p[x])

    def raced(j: int) -> int:
        place = torch.full_like(key, (position or 0) + j)
        return int(race_scores(p[j].scores.unsqueeze(0), streams.fold_in(key, place), row, 0).argmax())

    finite = all(law.soft for law in (*p[: len(ids)], *q))
    if mode == "block" and ids and finite:
        stop, w = block_stop(p, q, ids, [coin(j) for j in range(len(ids))])
    else:
        w, stop = 1.0, next((j for j, x in enumerate(ids) if not stands(j, x)), len(ids))
    if not p[stop].p.any():
        return stop, 0
    if mode == "match" and p[stop].soft:
        return stop, raced(stop)
    left = (w * p[stop].p - q[stop].p).clamp(min=0) if stop < len(ids) and mode in ("token", "block") else p[stop].p
    return stop, drawn(left if left.any() else p[stop].p)


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
    wide = streams.sum_dtype(target_logits)
    tokens = torch.full((b, k + 1), -1, dtype=torch.int64, device=device)
    logprobs = torch.zeros(b, k + 1, dtype=torch.float64, device=device)
    accepted, statuses = torch.zeros_like(tokens[:, 0]), torch.zeros_like(tokens[:, 0])
    keys, stream_rows = streams.row_keys(key, b)
    masks = None if bitmask is None else bitmask.reshape(-1, bitmask.shape[-1])
    lse = None if target_logsumexp is None or mode == "typical" else target_logsumexp.reshape(-1).tolist()
    cu = list(range(0, (b + 1) * (k + 1), k + 1)) if cu_num_logits is None else cu_num_logits.tolist()
    per_request: list[Any] = [a if a is None else a.expand(b).tolist() for a in (temperature, draft_temperature)]
    filters = [[a if a is None else a.to(device).expand(b)[n : n + 1] for a in (top_k, top_p, min_p)] for n in range(b)]
    for n in range(b):
        if cu[n] == cu[n + 1]:
            continue
        t = per_request[0][n]
        t_draft = t if per_request[1] is None else per_request[1][n]
        given = draft_token_ids[n, : cu[n + 1] - cu[n] - 1 if num_drafts is None else num_drafts[n]].tolist()
        end = next((j for j, x in enumerate(given) if not 0 <= x < vocab), len(given))
        ids, bad = given[:end], end < len(given) and given[end] != -1
        z = allowed_logits(target_logits, torch.arange(cu[n], cu[n] + end + 1, device=device), None, masks, None, 0.0)
        p = [law_of(z[j], t, tuple(filters[n]), math.nan if lse is None else lse[cu[n] + j]) for j in range(end + 1)]
        rows = draft_logits is not None and mode in ("token", "block") and t > 0 and t_draft > 0
        q = [Law(torch.zeros_like(z[0]).index_fill(0, torch.tensor(x, device=device), 1.0), z[0], z[0], 0, False)
             for x in ids]  # fmt: skip
        if rows:
            assert draft_logits is not None
            q = [law_of(over_targets(draft_logits[n, j].to(wide).double(), draft_to_target, vocab, t_draft), t_draft,
                        saved=math.nan if draft_logsumexp is None else float(draft_logsumexp[n, j]))
                 for j in range(end)]  # fmt: skip
        position = None if positions is None else int(positions[n])
        stop, token = verify(p, q, ids, keys[n : n + 1], stream_rows[n : n + 1], position, mode,
                             (typical_threshold, typical_alpha))  # fmt: skip
        emitted = torch.tensor([*ids[:stop], token], device=device)
        tokens[n, : stop + 1], accepted[n] = emitted, stop
        logprobs[n, : stop + 1] = torch.stack([p[j].log_p[x] for j, x in enumerate(emitted.tolist())])
        whole = mode == "block" and rows and ids and all(law.soft for law in (*p[:end], *q))
        seen = [*p[: stop + 1], *(law for j, law in enumerate(q[: stop + 1]) if p[j].soft)]
        for law in [*p[:end], *q, *p[: stop + 1]] if whole else seen:
            statuses[n] |= law.status
        statuses[n] |= BAD_ID * (bad and stop == end)
    return tokens, accepted, logprobs.to(wide), statuses
