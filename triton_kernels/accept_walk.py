"""Which drafts of a request stand, from the statistics of its rows: csrc/kernels/cpu/accept_request.h, accept_block.h.

Line place · B + b of the workspace has the tiles of a row of request b: of the target at places 0 … K, of the draft at
K + 1 … 2 K. A visit of a row costs 9 bytes a tile, so each program of a request walks for itself. Coins are compared
in float64 with sums that are known to SUM_ERROR: a rounding tie, one decision in some 10^7, may fall otherwise than on
the CPU.
"""

import triton
import triton.language as tl
from randfuse.reference import streams
from randfuse.reference.speculative_accept import NAN, NO_SUPPORT, POS_INF

from . import philox
from .accept_rows import element, saved_of
from .logit_tiles import INF, NONE
from .row_draws import coin53

COIN_DOMAIN = tl.constexpr(streams.domain_word(streams.ACCEPT_COIN, 32))
NAN, POS_INF, NO_SUPPORT = (tl.constexpr(bit) for bit in (NAN, POS_INF, NO_SUPPORT))
# Where the token after the last draft that stands comes from: it is known, p, or what is left of p beside q.
FORCED, FROM_TARGET, FROM_REST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def law_of(line, saved, t, tiles, top_ptr, sum_ptr, nan_ptr, TILES: tl.constexpr):
    """Maximum m of a row and Σ exp((z − m) / T), or 0 and 1 where it is not finite; the maximum itself; the status."""
    index = tl.arange(0, TILES)
    known = saved == saved
    inside, at = (index < tiles) & (known == 0), line * tiles + index
    tops = tl.load(top_ptr + at, mask=inside, other=-INF)
    sums = tl.load(sum_ptr + at, mask=inside, other=0.0)
    nan = tl.max(tl.load(nan_ptr + at, mask=inside, other=0).to(tl.int32), 0)
    top = tl.max(tops, 0)
    status = nan * NAN + tl.where(top == INF, POS_INF, 0) + tl.where(top == -INF, NO_SUPPORT, 0)
    top = tl.where(known, (saved * t).to(tl.float32), top)
    m = tl.where(tl.abs(top) < INF, top, 0.0).to(tl.float64)
    below = tl.where(sums > 0, (tops.to(tl.float64) - m) / t, -INF)
    total = tl.where(known, tl.exp(saved - m / t), tl.sum(sums * tl.exp(below), 0))
    return m, tl.where(total > 0, total, 1.0), top, tl.where(known, 0, status)


@triton.jit
def draft_law(b, B, K, j, lse_ptr, t, tiles, top_ptr, sum_ptr, nan_ptr, TILES: tl.constexpr):
    saved = saved_of(lse_ptr, b * K + j, True, t)
    return law_of((K + 1 + j) * B + b, saved, t, tiles, top_ptr, sum_ptr, nan_ptr, TILES)


@triton.jit
def entropy_of(line, m, total, t, tiles, top_ptr, sum_ptr, dot_ptr, TILES: tl.constexpr):
    index = tl.arange(0, TILES)
    inside, at = index < tiles, line * tiles + index
    sums = tl.load(sum_ptr + at, mask=inside, other=0.0)
    x = tl.where(sums > 0, (tl.load(top_ptr + at, mask=inside, other=0.0).to(tl.float64) - m) / t, 0.0)
    dots = tl.load(dot_ptr + at, mask=inside, other=0.0)
    return tl.log(total) - tl.sum(tl.where(sums > 0, tl.exp(x) * (dots + x * sums), 0.0), 0) / total


@triton.jit
def leader_of(line, tiles, score_ptr, leader_ptr, TILES: tl.constexpr):
    """The token with the best score of a row, the first of equals."""
    index = tl.arange(0, TILES)
    inside, at = index < tiles, line * tiles + index
    scores = tl.load(score_ptr + at, mask=inside, other=-INF)
    leaders = tl.load(leader_ptr + at, mask=inside, other=0)
    return tl.min(tl.where(inside & (scores == tl.max(scores, 0)), leaders, NONE), 0).to(tl.int64)


@triton.jit
def coin(key, i, j):
    """u of a draft."""
    r0, r1, _, _ = tl.philox(key, j.to(tl.uint32), i, i ^ i, COIN_DOMAIN, philox.WORD_ROUNDS)
    return coin53(r0, r1)


@triton.jit
def log_probability(z, m, total, top, t):
    return tl.where(tl.abs(top) < INF, (z - m) / t - tl.log(total), tl.where(top == INF, 0.0, float("nan")))


@triton.jit
def walk(
    b, B, K, first, own, ids, drafts, t, greedy, draft_t, draft_greedy, key, i, target_lse_ptr, draft_lse_ptr,
    threshold, alpha, tiles, top_ptr, sum_ptr, nan_ptr, leader_ptr, score_ptr, dot_ptr, drafted_ptr,
    MODE: tl.constexpr, DRAFT: tl.constexpr, TILES: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Place by place until a draft falls: the place, where its token comes from, the token if forced, one that is
    banned or −1, the status, and the log-probabilities of the drafts that stand."""
    index = tl.arange(0, IDS)
    stop, kind, status = tl.zeros([], tl.int64), tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    token, banned = tl.full([], -1, tl.int64), tl.full([], -1, tl.int64)
    logprobs = tl.zeros([IDS], tl.float64)
    going = own > 0
    while going:
        line, x = stop * B + b, element(ids, stop)
        saved = saved_of(target_lse_ptr, first + stop, greedy == 0, t)
        m, total, top, seen = law_of(line, saved, t, tiles, top_ptr, sum_ptr, nan_ptr, TILES)
        status = status | seen
        z = tl.load(drafted_ptr + line, mask=x >= 0, other=-INF).to(tl.float64)
        px = tl.exp((z - m) / t) / total
        accepted = tl.full([], False, tl.int1)
        kind, banned = tl.full([], FORCED, tl.int32), tl.full([], -1, tl.int64)
        if top == -INF:
            token = tl.zeros([], tl.int64)
        elif greedy | (top == INF) | (MODE == "match"):
            token = leader_of(line, tiles, score_ptr, leader_ptr, TILES)
            accepted = token == x
        else:
            kind = tl.full([], FROM_TARGET, tl.int32)
            if MODE == "typical":
                entropy = entropy_of(line, m, total, t, tiles, top_ptr, sum_ptr, dot_ptr, TILES)
                accepted = (x >= 0) & (px > tl.minimum(threshold, alpha * tl.exp(-entropy)))
            elif x >= 0:
                u = coin(key, i, stop)
                accepted, banned = u < px, x
                if DRAFT and draft_greedy == 0:
                    line += (K + 1) * B
                    qm, q_total, q_top, seen = draft_law(
                        b, B, K, stop, draft_lse_ptr, draft_t, tiles, top_ptr, sum_ptr, nan_ptr, TILES
                    )
                    status = status | seen
                    if tl.abs(q_top) < INF:
                        qz = tl.load(drafted_ptr + line).to(tl.float64)
                        accepted = u * (tl.exp((qz - qm) / draft_t) / q_total) < px
                        kind, banned = tl.full([], FROM_REST, tl.int32), tl.full([], -1, tl.int64)
                    else:  # all mass of q on one token, or none anywhere
                        point = leader_of(line, tiles, top_ptr, leader_ptr, TILES)
                        banned = tl.where(q_top == INF, point, -1)
                        accepted = tl.where(x == banned, u < px, px > 0)
        here = log_probability(z, m, total, top, t)
        logprobs = tl.where(index == tl.where(accepted, stop, -1), here, logprobs)
        stop += accepted.to(tl.int64)
        going = accepted
    return stop, kind, token, banned, status, logprobs


@triton.jit
def walk_block(
    place, b, B, K, first, own, ids, drafts, t, greedy, draft_t, draft_greedy, key, i, target_lse_ptr, draft_lse_ptr,
    rest_ptr, tiles, top_ptr, sum_ptr, nan_ptr, drafted_ptr, TILES: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Whether a request is verified as a whole, the last place that stands and w there, w at `place`, status and
    log-probabilities of all drafts. Before masses are known the place is that after the last draft, or 0."""
    index = tl.arange(0, IDS)
    stop, j, status = tl.zeros([], tl.int64), tl.zeros([], tl.int64), tl.zeros([], tl.int32)
    w, u = tl.full([], 1.0, tl.float64), tl.zeros([], tl.float64)
    w_stop, w_place = w, w
    logprobs = tl.zeros([IDS], tl.float64)
    whole = (drafts > 0) & (greedy == 0) & (draft_greedy == 0)
    while whole & (j < drafts):
        line = j * B + b
        saved = saved_of(target_lse_ptr, first + j, True, t)
        m, total, top, seen = law_of(line, saved, t, tiles, top_ptr, sum_ptr, nan_ptr, TILES)
        status = status | seen
        z = tl.load(drafted_ptr + line).to(tl.float64)
        px = tl.exp((z - m) / t) / total
        logprobs = tl.where(index == j, log_probability(z, m, total, top, t), logprobs)
        line += (K + 1) * B
        qm, q_total, q_top, seen = draft_law(
            b, B, K, j, draft_lse_ptr, draft_t, tiles, top_ptr, sum_ptr, nan_ptr, TILES
        )
        status = status | seen
        qx = tl.exp((tl.load(drafted_ptr + line).to(tl.float64) - qm) / draft_t) / q_total
        whole = (tl.abs(top) < INF) & (tl.abs(q_top) < INF)
        w_place = tl.where(j == place, w, w_place)
        if rest_ptr is not None:
            at = tl.arange(0, TILES)
            left = tl.load(rest_ptr + (b * K + j) * tiles + at, mask=at < tiles, other=0.0, cache_modifier=".cg")
            rest = tl.sum(left.to(tl.float64), 0)
            every = rest + (1.0 - w)  # h = 1 where w = 1, to the last bit
            if (j > 0) & ((u * every < rest) | (every <= 0)):
                stop, w_stop = j, w
        u = coin(key, i, j)
        ratio = tl.where(qx > 0, px / tl.where(qx > 0, qx, 1.0), INF)
        w = tl.where((px == 0) | (w == 0), 0.0, tl.minimum(w * ratio, 1.0))
        j += 1
    stop = tl.where(u < w, drafts, stop)
    return whole, stop, w_stop, w_place, status, logprobs
