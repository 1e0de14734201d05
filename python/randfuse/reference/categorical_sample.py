"""Reference of `categorical_sample`: the law of softmax(z / T) in float64, tile by tile as docs/streams.md fixes it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from . import streams

TILE = 1024


def allowed_logits(
    logits: Tensor,
    rows: Tensor,
    exclude: Tensor | None,
    bitmask: Tensor | None,
    uncond_logits: Tensor | None,
    cfg_scale: float,
    col_offset: int = 0,
) -> Tensor:
    """(R, V) float64 of the chosen rows: guidance in the accumulation type, −inf where a token is not allowed."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = _checks.matrix(logits)[rows].to(wide)
    if uncond_logits is not None:
        u = _checks.matrix(uncond_logits)[rows].to(wide)
        z = u + torch.tensor(cfg_scale + 1, dtype=wide, device=z.device) * (z - u)
    token = torch.arange(z.shape[-1], device=z.device)
    if exclude is not None:
        z = z.masked_fill(torch.isin(token + col_offset, exclude), -torch.inf)
    if bitmask is not None:
        z = z.where((bitmask[rows][:, token // 32] >> (token % 32)) & 1 == 1, -torch.inf)
    return z.double()


def filtered(x: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """x = (z − max) / T with −inf where a filter drops; the arguments are (R,). Ties go to the lowest index."""
    s, order = x.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(x.shape[-1], device=x.device)
        s = s.where(rank < top_k.unsqueeze(-1), -torch.inf)
    if top_p is not None:
        mass = s.exp().cumsum(-1)
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)
        crossed = before >= top_p.double().unsqueeze(-1) * mass[:, -1:]
        crossed[:, 0] = False
        s = s.masked_fill(crossed & (top_p < 1).unsqueeze(-1), -torch.inf)
    if min_p is not None:
        s = s.masked_fill(s < min_p.double().log().unsqueeze(-1), -torch.inf)
    return torch.empty_like(s).scatter(-1, order, s)


def draw_cdf(x: Tensor, keys: Tensor, rows: Tensor, draw: int, op: int = streams.CATEGORICAL) -> Tensor:
    """One 53-bit coin picks the tile by its mass, another the token in it; nothing of no mass is ever picked."""
    tiles = torch.nn.functional.pad(x, (0, -x.shape[-1] % TILE), value=-torch.inf).unflatten(-1, (-1, TILE))
    top = tiles.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weight = (tiles - top).exp()
    words = streams.block(keys, rows, 0, op=op, width=32, sample=draw)
    u, v = (((high << 21) | (low >> 11)).double() * 2.0**-53 for low, high in (words[:2], words[2:]))
    tile = _first_above((weight.sum(-1) * top.squeeze(-1).exp()).cumsum(-1), u)
    inside = weight.gather(1, tile.reshape(-1, 1, 1).expand(-1, 1, TILE)).squeeze(1)
    return tile * TILE + _first_above(inside.cumsum(-1), v)


def _first_above(prefix: Tensor, u: Tensor) -> Tensor:
    found = torch.searchsorted(prefix, (u * prefix[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    return found.clamp(max=prefix.shape[-1] - 1)


def race_scores(z_over_t: Tensor, keys: Tensor, rows: Tensor, draw: int, col_offset: int = 0) -> Tensor:
    """z / T − log E, of which the largest wins."""
    token = torch.arange(z_over_t.shape[-1], device=z_over_t.device) + col_offset
    high, low = (
        streams.lanes(keys, rows, token, op=op, width=32, rounds=streams.WORD_ROUNDS, sample=draw)
        for op in (streams.RACE_HIGH, streams.RACE_LOW)
    )
    return z_over_t - streams.race_exponential(high, low).log()


def statistics(x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """logprob, log_odds (…, M), margin, entropy (…) of the law exp(x) / Σ exp(x), max x = 0; nothing saturates."""
    w = x.exp()
    best = x.argmax(-1, keepdim=True)
    rest = w.scatter(-1, best, 0.0).sum(-1)
    second = w.scatter(-1, best, 0.0).amax(-1)
    total = 1 + rest
    x_token = x.gather(-1, tokens)
    others = torch.stack([w.scatter(-1, t, 0.0).sum(-1) for t in tokens.split(1, -1)], -1)
    margin = ((total + 1 - second) / (rest + second)).log()
    entropy = rest.log1p() - (w * x.clamp(min=-800)).sum(-1) / total
    return x_token - rest.log1p().unsqueeze(-1), x_token - others.log(), margin, entropy


def categorical_sample_with_stats(
    logits: Tensor,
    key: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    exclude: Tensor | None,
    bitmask: Tensor | None,
    uncond_logits: Tensor | None,
    cfg_scale: float,
    rows: Tensor | None,
    num_samples: int | None,
    method: str,
    row_offset: int,
) -> tuple[Tensor, ...]:
    """Tokens and their statistics; see `ops.categorical_sample` for shapes and for rows that are not finite."""
    n = _checks.rows_cols(logits.shape)[0]
    shape = logits.shape[:-1] if rows is None else rows.shape
    rows = torch.arange(n, device=logits.device) if rows is None else rows
    keys, stream_rows = (t[rows] for t in streams.row_keys(key, n, row_offset))
    t = temperature.to(logits.device).expand(n)[rows].double()
    filters = (a if a is None else a.to(logits.device).expand(n)[rows] for a in (top_k, top_p, min_p))
    z = allowed_logits(logits, rows, exclude, bitmask, uncond_logits, cfg_scale)
    nan = z.isnan().any(-1)
    z = z.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    top, best = z.max(-1, keepdim=True)  # lowest index among equals
    warm = torch.where(t > 0, t, 1.0).unsqueeze(-1)
    x = torch.where(z == top, 0.0, (z - top) / warm)
    point = torch.full_like(x, -torch.inf).scatter(-1, best, 0.0)
    x = torch.where(top.isfinite(), filtered(x, *filters), point)
    scores = (z / warm).masked_fill(x.isinf(), -torch.inf)
    draw = (
        (lambda s: draw_cdf(x, keys, stream_rows, s))
        if method == "cdf"
        else (lambda s: race_scores(scores, keys, stream_rows, s).argmax(-1))
    )
    tokens = torch.stack([draw(s) for s in range(num_samples or 1)], -1)
    tokens = torch.where((t > 0).unsqueeze(-1) & top.isfinite(), tokens, best)
    stats = [s.masked_fill(top.squeeze(-1).isneginf().reshape(-1, *[1] * (s.dim() - 1)), torch.nan)
             for s in statistics(x, tokens)]  # fmt: skip
    logsumexp = (top / warm).squeeze(-1) + x.exp().sum(-1).log()
    out_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stats = [s.to(out_dtype) for s in (*stats, logsumexp.masked_fill(nan, torch.nan))]
    per_draw = (*shape,) if num_samples is None else (*shape, num_samples)
    return tokens.reshape(per_draw), *(s.reshape(per_draw if s.dim() == 2 else shape) for s in stats)


def categorical_sample(
    logits: Tensor,
    key: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    exclude: Tensor | None,
    bitmask: Tensor | None,
    uncond_logits: Tensor | None,
    cfg_scale: float,
    rows: Tensor | None,
    num_samples: int | None,
    method: str,
    row_offset: int,
) -> Tensor:
    """The tokens alone."""
    arguments = (temperature, top_k, top_p, min_p, exclude, bitmask, uncond_logits, cfg_scale, rows, num_samples)
    return categorical_sample_with_stats(logits, key, *arguments, method, row_offset)[0]


def categorical_race(
    logits: Tensor,
    key: Tensor,
    temperature: Tensor,
    exclude: Tensor | None,
    bitmask: Tensor | None,
    uncond_logits: Tensor | None,
    cfg_scale: float,
    rows: Tensor | None,
    num_samples: int | None,
    row_offset: int,
    col_offset: int,
) -> tuple[Tensor, Tensor]:
    """Winners of the races of a shard of the vocabulary and their scores; at temperature 0 the largest logit."""
    n = _checks.rows_cols(logits.shape)[0]
    shape = logits.shape[:-1] if rows is None else rows.shape
    rows = torch.arange(n, device=logits.device) if rows is None else rows
    keys, stream_rows = (t[rows] for t in streams.row_keys(key, n, row_offset))
    t = temperature.to(logits.device).expand(n)[rows].double().unsqueeze(-1)
    z = allowed_logits(logits, rows, exclude, bitmask, uncond_logits, cfg_scale, col_offset)
    z = z.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) / torch.where(t > 0, t, 1.0)
    scores = (torch.where(t > 0, race_scores(z, keys, stream_rows, s, col_offset), z) for s in range(num_samples or 1))
    score, tokens = (torch.stack(x, -1) for x in zip(*(s.max(-1) for s in scores), strict=True))
    per_draw = (*shape,) if num_samples is None else (*shape, num_samples)
    return (tokens + col_offset).reshape(per_draw), score.reshape(per_draw)
