"""Speculative acceptance: what csrc/kernels/cpu/speculative_accept.h does to a request, for all requests at once.

    accept_stats_kernel   a program a tile of every row that may count: the logits once, 13 bytes a tile written
    accept_kernel         programs of a request walk to its stop (accept_walk.py) and share out what they must read of
                          the stop row pair; the last of them to finish draws the token

Two launches in every mode; block reads the pairs of all places again, unless all drafts stand. Filters add two: cuts
(filters.py), and the statistics of what is left. All rows are read at once, those after the stop too: one row more or
less costs a GPU less than waiting for a decision.

Greedy tokens and races (mode match) are the CPU's to the bit, and so are draws from p. What is left of p beside q is
summed in float32 and drawn from as it is, where the CPU takes an open draw again in float64: alone, one program would
need longer for that than all of them for the call. It may choose a neighbour, once in 10^5 to 10^6 rejected requests.
"""

import torch
import triton
import triton.language as tl
from randfuse import _checks, _sampling
from randfuse.reference import streams

from . import launch, philox
from .accept_rows import read_draft, read_target, request_of, saved_of, target_row, temperatures
from .accept_stats import accept_stats_kernel
from .accept_walk import FORCED, FROM_REST, FROM_TARGET, draft_law, law_of, leader_of, log_probability, walk, walk_block
from .filters import BINS, categorical_cuts_kernel
from .logit_tiles import INF, TILE, cut_of, pick
from .row_draws import coin53, draw_by_mass, exponentials

REST_DOMAIN = tl.constexpr(streams.domain_word(streams.RESIDUAL, 32))
MODES = ("token", "block", "match", "typical")
PROGRAMS, SPAN = 512, 16  # as many in the second launch as fill a GPU, but no more tiles for each than SPAN


@triton.jit
def weight32(z, m, total, w, t):
    """w exp((z − m) / T) / total in float32."""
    slope = (1.4426950408889634 / t).to(tl.float32)
    return tl.exp2((z - m.to(tl.float32)) * slope) * (w / total).to(tl.float32)


@triton.jit
def weight64(z, m, total, w, t):
    return tl.exp((z.to(tl.float64) - m) / t) * (w / total)


@triton.jit
def accept_kernel(
    B: tl.int64, K: tl.int64, tiles, rows: tl.int64, V: tl.int64, ids_ptr, count_ptr, cu_ptr, key_ptr,
    requests_per_key: tl.int64, position_ptr, temperature_ptr, draft_temperature_ptr, target_lse_ptr, draft_lse_ptr,
    threshold, alpha, top_ptr, sum_ptr, nan_ptr, leader_ptr, score_ptr, dot_ptr, drafted_ptr, ticket_ptr, rest_ptr,
    value_ptr, last_ptr, target_ptr, stride_b: tl.int64, stride_j: tl.int64, bitmask_ptr, words: tl.int64, draft_ptr,
    draft_stride_b: tl.int64, draft_stride_j: tl.int64, begin_ptr, column_ptr, slots: tl.int64, splits: tl.int64,
    span: tl.int64, token_out_ptr, accepted_ptr, logprob_ptr, status_ptr, MODE: tl.constexpr, WARM: tl.constexpr,
    DRAFT_WARM: tl.constexpr, TILES: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """What a request emits: programs are its slots (in mode block its places) times its splits of the vocabulary."""
    unit = tl.program_id(0).to(tl.int64)
    split, slot, b = unit % splits, unit // splits % slots, unit // splits // slots
    first, own, ids, drafts, bad = request_of(b, ids_ptr, count_ptr, cu_ptr, rows, K, V, IDS)
    t, greedy, draft_t, draft_greedy = temperatures(b, temperature_ptr, draft_temperature_ptr, WARM, DRAFT_WARM)
    group = b // requests_per_key
    i = (b - group * requests_per_key).to(tl.uint32)
    key = tl.load(key_ptr + group)
    if position_ptr is not None:
        key = philox.fold_in(key, tl.load(position_ptr + b))
    DRAFT: tl.constexpr = draft_ptr is not None
    BLOCK: tl.constexpr = DRAFT and MODE == "block"

    whole = tl.full([], False, tl.int1)
    stop, kind, status = tl.zeros([], tl.int64), tl.full([], FROM_REST, tl.int32), tl.zeros([], tl.int32)
    token, banned = tl.full([], -1, tl.int64), tl.full([], -1, tl.int64)
    w, logprobs = tl.full([], 1.0, tl.float64), tl.zeros([IDS], tl.float64)
    if BLOCK:
        whole, stop, _w_stop, w, status, logprobs = walk_block(
            slot, b, B, K, first, own, ids, drafts, t, greedy, draft_t, draft_greedy, key, i, target_lse_ptr,
            draft_lse_ptr, None, tiles, top_ptr, sum_ptr, nan_ptr, drafted_ptr, TILES, IDS,
        )  # fmt: skip
    if whole == 0:
        stop, kind, token, banned, status, logprobs = walk(
            b, B, K, first, own, ids, drafts, t, greedy, draft_t, draft_greedy, key, i, target_lse_ptr, draft_lse_ptr,
            threshold, alpha, tiles, top_ptr, sum_ptr, nan_ptr, leader_ptr, score_ptr, dot_ptr, drafted_ptr, MODE,
            DRAFT, TILES, IDS,
        )  # fmt: skip
        w = tl.full([], 1.0, tl.float64)

    if ticket_ptr is not None:
        open_places = whole & (stop < drafts)  # of which the last to stand needs their masses
        place = tl.where(open_places, slot, stop)
        kind = tl.where(whole & (stop == drafts), FROM_TARGET, kind)
        if (kind != FORCED) & tl.where(open_places, slot < drafts, slot == 0):
            line, rest_at = place * B + b, (b * slots + slot) * tiles
            saved = saved_of(target_lse_ptr, first + place, greedy == 0, t)
            m, total, _top, _seen = law_of(line, saved, t, tiles, top_ptr, sum_ptr, nan_ptr, TILES)
            value, last = cut_of(value_ptr, last_ptr, line)
            p_ptr = target_row(b, first, place, target_ptr, stride_b, stride_j, cu_ptr)
            qm, q_total = m, total
            if DRAFT and kind == FROM_REST:
                qm, q_total, _top, _seen = draft_law(
                    b, B, K, place, draft_lse_ptr, draft_t, tiles, top_ptr, sum_ptr, nan_ptr, TILES
                )
            for tile in range(split * span, tl.minimum(split * span + span, tiles)):
                z, _nan = read_target(tile, first + place, True, value, last, p_ptr, V, bitmask_ptr, words)
                if saved == saved:  # not measured so far
                    top, _x, e = exponentials(z, t)
                    tl.store(top_ptr + line * tiles + tile, top)
                    tl.store(sum_ptr + line * tiles + tile, tl.sum(e, 0))
                if DRAFT and kind == FROM_REST:
                    q_ptr = draft_ptr + b * draft_stride_b + place * draft_stride_j
                    zq, _nan = read_draft(tile, draft_t, q_ptr, V, begin_ptr, column_ptr)
                    left = weight32(z, m, total, w, t) - weight32(zq, qm, q_total, 1.0, draft_t)
                    tl.store(rest_ptr + rest_at + tile, tl.sum(tl.maximum(left, 0.0), 0))
        tl.debug_barrier()
        if tl.atomic_add(ticket_ptr + b, 1) != slots * splits - 1:
            return
    if BLOCK and whole:
        _whole, stop, w, _w_place, _status, _logprobs = walk_block(
            slot, b, B, K, first, own, ids, drafts, t, greedy, draft_t, draft_greedy, key, i, target_lse_ptr,
            draft_lse_ptr, rest_ptr, tiles, top_ptr, sum_ptr, nan_ptr, drafted_ptr, TILES, IDS,
        )  # fmt: skip
    index, local, line = tl.arange(0, TILES), tl.arange(0, TILE), stop * B + b
    saved = saved_of(target_lse_ptr, first + stop, (greedy == 0) & (own > 0), t)
    m, total, top, seen = law_of(line, saved, t, tiles, top_ptr, sum_ptr, nan_ptr, TILES)
    value, last = cut_of(value_ptr, last_ptr, line)
    p_ptr = target_row(b, first, stop, target_ptr, stride_b, stride_j, cu_ptr)
    if (kind != FORCED) & (tl.abs(top) == INF):  # a request as a whole, after all its drafts
        token = tl.where(top == INF, leader_of(line, tiles, top_ptr, leader_ptr, TILES), 0)
        kind = tl.full([], FORCED, tl.int32)
    if kind != FORCED:
        r0, r1, r2, r3 = tl.philox(key, i ^ i, i, i ^ i, REST_DOMAIN, philox.WORD_ROUNDS)
        u, v = coin53(r0, r1), coin53(r2, r3)
        drawn = tl.full([], False, tl.int1)
        if DRAFT and kind == FROM_REST:
            qm, q_total, _top, _seen = draft_law(
                b, B, K, stop, draft_lse_ptr, draft_t, tiles, top_ptr, sum_ptr, nan_ptr, TILES
            )
            rest_at = (b * slots + tl.where(whole, stop, 0)) * tiles + index
            rest = tl.load(rest_ptr + rest_at, mask=index < tiles, other=0.0, cache_modifier=".cg")
            tile, _before, _after, mass = pick(index, rest.to(tl.float64), u)
            z, _nan = read_target(tile, first + stop, True, value, last, p_ptr, V, bitmask_ptr, words)
            q_ptr = draft_ptr + b * draft_stride_b + stop * draft_stride_j
            zq, _nan = read_draft(tile, draft_t, q_ptr, V, begin_ptr, column_ptr)
            left = weight64(z, m, total, w, t) - weight64(zq, qm, q_total, 1.0, draft_t)
            spot, _before, _after, in_tile = pick(local, tl.maximum(left, 0.0), v)
            token = tile.to(tl.int64) * TILE + spot
            drawn = (mass > 0) & (in_tile > 0)  # else q left nothing of p
        if drawn == 0:
            at = line * tiles + index
            tops = tl.load(top_ptr + at, mask=index < tiles, other=-INF, cache_modifier=".cg")
            sums = tl.load(sum_ptr + at, mask=index < tiles, other=0.0, cache_modifier=".cg").to(tl.float64)
            if banned >= 0:
                tile = banned // TILE
                z, _nan = read_target(tile, first + stop, True, value, last, p_ptr, V, bitmask_ptr, words)
                best, _x, e = exponentials(tl.where(local + tile * TILE == banned, -INF, z), t)
                tops = tl.where(index == tile, best, tops)
                sums = tl.where(index == tile, tl.sum(e, 0).to(tl.float64), sums)
            row_max = tl.max(tops, 0)
            token = banned
            if row_max > -INF:
                token, _sums = draw_by_mass(
                    u, v, banned, tops, sums, row_max, 1.0 / t, tiles, first + stop, True, value, last, p_ptr, 0, V,
                    None, 0, None, None, 0, bitmask_ptr, words, 0,
                )  # fmt: skip
    z, _nan = read_target(token // TILE, first + stop, own > 0, value, last, p_ptr, V, bitmask_ptr, words)
    chosen = tl.max(tl.where(local == token % TILE, z, -INF), 0).to(tl.float64)
    here = tl.where(own > 0, log_probability(chosen, m, total, top, t), 0.0)
    index, out = tl.arange(0, IDS), b * (K + 1) + tl.arange(0, IDS)
    tokens = tl.where(index < stop, ids, tl.where(index == stop, token, -1))
    tl.store(token_out_ptr + out, tokens, mask=index <= K)
    logprobs = tl.where(index < stop, logprobs, tl.where(index == stop, here, 0.0))
    tl.store(logprob_ptr + out, logprobs.to(tl.float32), mask=index <= K)
    tl.store(accepted_ptr + b, stop)
    status = tl.where(own > 0, status | seen, 0) | tl.where(stop == drafts, bad, 0)
    tl.store(status_ptr + b, status.to(tl.int64))


@launch.op(
    "speculative_accept(Tensor target_logits, Tensor draft_token_ids, Tensor key, Tensor? draft_logits,"
    " Tensor? num_drafts, Tensor? cu_num_logits, Tensor temperature, Tensor? draft_temperature, Tensor? top_k,"
    " Tensor? top_p, Tensor? min_p, Tensor? bitmask, str mode, float typical_threshold, float typical_alpha,"
    " Tensor? draft_logsumexp, Tensor? target_logsumexp, Tensor? draft_to_target, Tensor? positions)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def speculative_accept(
    target_logits, draft_token_ids, key, draft_logits, num_drafts, cu_num_logits, temperature, draft_temperature, top_k,
    top_p, min_p, bitmask, mode, typical_threshold, typical_alpha, draft_logsumexp, target_logsumexp, draft_to_target,
    positions,
):  # fmt: skip
    op, device, vocab = "speculative_accept", target_logits.device, target_logits.shape[-1]
    launch.floating(op, target_logits=target_logits, draft_logits=draft_logits)
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be 'token', 'block', 'match' or 'typical', got {mode!r}")
    if draft_token_ids.dim() != 2:
        raise ValueError(f"{op}: draft_token_ids must have shape (B, K), got {tuple(draft_token_ids.shape)}")
    (b, k), packed = draft_token_ids.shape, cu_num_logits is not None
    if target_logits.dim() != (2 if packed else 3) or not 1 <= vocab <= _sampling.MAX_VOCAB:
        raise ValueError(
            f"{op}: target_logits must have shape (B, K+1, V), or (rows, V) with cu_num_logits, with V in [1, 2**20],"
            f" got {tuple(target_logits.shape)}"
        )
    if packed and num_drafts is not None:
        raise ValueError(f"{op}: num_drafts must be None with cu_num_logits, got both")
    leading = tuple(target_logits.shape[:-1])
    if not packed:
        _checks.shape(op, "target_logits", target_logits, (b, k + 1, vocab), "(B, K+1, V)")
    _checks.key_tensor(op, key, b, device)
    words = (vocab + 31) // 32

    def integers(name, x, shape, letters, dtype=torch.int64):
        if x is None:
            return None
        _sampling.integers(op, name, x, dtype, device)
        _checks.shape(op, name, x, shape, letters)
        return x.contiguous()

    def saved(name, x, shape, used):
        if x is None:
            return None
        _checks.float_tensor(op, name, x, like=target_logits, dtype=False)
        _checks.shape(op, name, x, shape, "(…)")
        return x.contiguous() if used else None

    ids = integers("draft_token_ids", draft_token_ids, (b, k), "(B, K)")
    counts = integers("num_drafts", num_drafts, (b,), "(B,)")
    cu = integers("cu_num_logits", cu_num_logits, (b + 1,), "(B+1,)")
    places = integers("positions", positions, (b,), "(B,)")
    bits = integers("bitmask", bitmask, (*leading, words), "(…, ⌈V/32⌉)", torch.int32)
    ratio = mode in ("token", "block") and k > 0
    target_lse = saved("target_logsumexp", target_logsumexp, leading, mode != "typical")
    draft_lse = saved("draft_logsumexp", draft_logsumexp, (b, k), ratio)
    heat, draft_heat, top_k, top_p, min_p = (
        launch.parameter(op, name, value, b, device)
        for name, value in (
            ("temperature", temperature), ("draft_temperature", draft_temperature), ("top_k", top_k),
            ("top_p", top_p), ("min_p", min_p),
        )
    )  # fmt: skip
    filters = not (top_k is None and top_p is None and min_p is None)
    if filters and target_logsumexp is not None:
        raise ValueError(f"{op}: target_logsumexp must be None with top_k, top_p or min_p, got both")
    columns = (None, None)
    if draft_logits is None and draft_to_target is not None:
        raise ValueError(f"{op}: draft_to_target must be None without draft_logits, got a Tensor")
    if draft_logits is not None:
        width = vocab
        if draft_to_target is not None:
            width = draft_to_target.numel()
            tokens, column = integers("draft_to_target", draft_to_target, (width,), "(V_draft,)").sort(stable=True)
            columns = torch.searchsorted(tokens, torch.arange(vocab + 1, device=device)), column
        _checks.shape(op, "draft_logits", draft_logits, (b, k, width), "(B, K, V)")
    draft = _unit_stride(draft_logits) if draft_logits is not None and ratio else None

    like = {"device": device}
    tokens, accepted, status = (torch.empty(s, dtype=torch.int64, **like) for s in ((b, k + 1), (b,), (b,)))
    logprobs = torch.empty(b, k + 1, dtype=torch.float32, **like)
    if b == 0:
        return tokens, accepted, logprobs, status
    if filters:  # which read rows of one stride
        target = launch.unit_stride_matrix(target_logits).view(target_logits.shape)
    else:
        target = _unit_stride(target_logits)
    tiles, match = triton.cdiv(vocab, TILE.value), mode == "match"
    lines = b * (k + 1 if draft is None else 2 * k + 1)

    def workspace(wanted, dtype, *shape):
        return torch.empty(shape, dtype=dtype, **like) if wanted else None

    top, total = (workspace(True, torch.float32, lines, tiles) for _ in range(2))
    leader = workspace(True, torch.int32, lines, tiles)
    score = workspace(match, torch.float64, lines, tiles) if match else top
    nan, dot = workspace(True, torch.int8, lines, tiles), workspace(mode == "typical", torch.float64, lines, tiles)
    drafted = workspace(True, torch.float32, lines)
    shared = draft is not None or (target_lse is not None and not match)
    slots = k if draft is not None and mode == "block" else 1
    rest = workspace(draft is not None, torch.float32, b * slots, tiles)
    ticket = workspace(shared, torch.int32, b)
    row = workspace(filters, torch.int64, b * (k + 1))
    value, last = workspace(filters, torch.float32, b * (k + 1)), workspace(filters, torch.int64, b * (k + 1))

    request = (b, k, tiles, leading[0] if packed else b * (k + 1), vocab, ids, counts, cu, key.contiguous(),
               max(b // key.numel(), 1), places, heat, draft_heat, target_lse, draft_lse)  # fmt: skip
    found = (top, total, nan, leader, score, dot, drafted)
    of_target = (target, 0 if packed else target.stride(0), target.stride(-2), bits, words)
    of_draft = (None, 0, 0) if draft is None else (draft, draft.stride(0), draft.stride(1))
    options = {
        "WARM": heat.dim() == 1, "DRAFT_WARM": draft_heat is not None and draft_heat.dim() == 1,
        "IDS": triton.next_power_of_2(k + 1), "enable_fp_fusion": False,
    }  # fmt: skip
    spread = {"TILES": triton.next_power_of_2(tiles)}
    accept_stats_kernel[(lines * tiles,)](
        *request,
        *found,
        row,
        ticket,
        None,
        None,
        *of_target,
        *of_draft,
        *columns,
        RACE=match and not filters,
        **options,
    )
    if filters:
        bins = workspace(True, torch.int64, b * (k + 1), BINS.value)
        per_row = {
            f"{name}_ROWS": x is not None and x.dim() == 1
            for name, x in (("WARM", heat), ("K", top_k), ("P", top_p), ("MIN", min_p))
        }
        flat = launch.unit_stride_matrix(target)
        categorical_cuts_kernel[(b * (k + 1),)](
            row, flat.shape[0], tiles, heat, top, total, value, last, bins, top_k, top_p, min_p, flat, flat.stride(0),
            vocab, None, 0, None, None, 0, bits, words, 0, b, **per_row, **spread, enable_fp_fusion=False,
        )  # fmt: skip
        accept_stats_kernel[(b * (k + 1) * tiles,)](
            *request, *found, None, None, value, last, *of_target, None, 0, 0, None, None, RACE=match, **options
        )
    span = min(SPAN, max(1, tiles * b * slots // PROGRAMS)) if shared else tiles
    splits = triton.cdiv(tiles, span) if shared else 1
    accept_kernel[(b * slots * splits,)](
        *request, typical_threshold, typical_alpha, *found, ticket, rest, value, last, *of_target, *of_draft, *columns,
        slots, splits, span, tokens, accepted, logprobs, status, MODE=mode, num_warps=8, **options, **spread,
    )  # fmt: skip
    return tokens, accepted, logprobs, status


def _unit_stride(x):
    """Rows of any strides; one whose elements do not follow one another is copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
