"""The first launch of speculative acceptance: the statistics of every tile of the rows that may count."""

import triton
import triton.language as tl

from . import philox
from .accept_rows import element, read_draft, read_target, request_of, saved_of, target_row, temperatures
from .logit_tiles import INF, NONE, TILE, cut_of
from .row_draws import exponentials, race_tile, tile_dot


@triton.jit
def accept_stats_kernel(
    B: tl.int64, K: tl.int64, tiles, rows: tl.int64, V: tl.int64, ids_ptr, count_ptr, cu_ptr, key_ptr,
    requests_per_key: tl.int64, position_ptr, temperature_ptr, draft_temperature_ptr, target_lse_ptr, draft_lse_ptr,
    top_ptr, sum_ptr, nan_ptr, leader_ptr, score_ptr, dot_ptr, drafted_ptr, row_ptr, ticket_ptr, value_ptr, last_ptr,
    target_ptr, stride_b: tl.int64, stride_j: tl.int64, bitmask_ptr, words: tl.int64, draft_ptr,
    draft_stride_b: tl.int64, draft_stride_j: tl.int64, begin_ptr, column_ptr, RACE: tl.constexpr, WARM: tl.constexpr,
    DRAFT_WARM: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Maximum and Σ exp((z − max) / T) of a tile, its first maximum or its winner, and the logit of the draft in it."""
    unit = tl.program_id(0).to(tl.int64)
    line = unit // tiles
    tile = unit - line * tiles
    place = line // B
    b = line - place * B
    first, own, ids, drafts, _bad = request_of(b, ids_ptr, count_ptr, cu_ptr, rows, K, V, IDS)
    t, greedy, draft_t, draft_greedy = temperatures(b, temperature_ptr, draft_temperature_ptr, WARM, DRAFT_WARM)
    j, of_draft = place, place > K
    wanted = (j <= drafts) & (own > 0)
    if draft_ptr is not None:
        j = tl.where(of_draft, place - K - 1, place)
        wanted = tl.where(of_draft, (j < drafts) & (greedy == 0) & (draft_greedy == 0), wanted)
    saved = saved_of(target_lse_ptr, first + j, wanted & (of_draft == 0) & (greedy == 0), t)
    if draft_ptr is not None:
        saved_draft = saved_of(draft_lse_ptr, b * K + j, wanted & of_draft, draft_t)
        saved = tl.where(of_draft, saved_draft, saved)
        t = tl.where(of_draft, draft_t, t)
    x = element(ids, j)
    here = (x >= 0) & (x // TILE == tile)
    index = tl.arange(0, TILE)
    if wanted & ((saved != saved) | here | RACE):
        value, last = cut_of(value_ptr, last_ptr, line)
        p_ptr = target_row(b, first, j, target_ptr, stride_b, stride_j, cu_ptr)
        z, nan = read_target(tile, first + j, of_draft == 0, value, last, p_ptr, V, bitmask_ptr, words)
        if draft_ptr is not None and of_draft:
            z, nan = read_draft(tile, t, draft_ptr + b * draft_stride_b + j * draft_stride_j, V, begin_ptr, column_ptr)
        top, below, e = exponentials(z, t)
        tl.store(top_ptr + unit, top)
        tl.store(sum_ptr + unit, tl.sum(e, 0))
        tl.store(nan_ptr + unit, nan.to(tl.int8))
        if dot_ptr is not None:
            tl.store(dot_ptr + unit, tile_dot(e, below))
        if RACE:
            position = 0 if position_ptr is None else tl.load(position_ptr + b)
            group = b // requests_per_key
            i = (b - group * requests_per_key).to(tl.uint32)
            key = philox.fold_in(tl.load(key_ptr + group), position + j)
            best, winner = race_tile(z, tile, 0, key, i, i ^ i, t, greedy)
            tl.store(score_ptr + unit, best)
            tl.store(leader_ptr + unit, winner.to(tl.int32))
        else:
            tl.store(leader_ptr + unit, (tile * TILE + tl.min(tl.where(z == top, index, NONE), 0)).to(tl.int32))
        if here:
            tl.store(drafted_ptr + line, tl.max(tl.where(index == x % TILE, z, -INF), 0))
    if row_ptr is not None:
        tl.store(row_ptr + line, tl.where(wanted, first + j, -1), mask=(tile == 0) & (of_draft == 0))
    if ticket_ptr is not None:
        tl.store(ticket_ptr + b, 0, mask=unit == b * tiles)
