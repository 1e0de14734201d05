"""Categorical sampling: the tokens of `csrc/kernels/cuda/categorical_sample.cuh`, a program a tile, or a row and draw.

    cdf      stats (the logits once, 28 bytes a tile written), then draw (the row's statistics and one tile again)
    race     race (a program a tile and draw, bound by Philox), then draw
    filters  stats, cuts (filters.py), stats of what is left

Values in device memory cannot be refused: they are brought into their ranges as on CUDA. No product is fused with a sum
(enable_fp_fusion=False): guidance rounds each step, on every backend.
"""

import math

import torch
import triton
import triton.language as tl
from randfuse import _checks, _sampling
from randfuse.reference import streams

from . import launch, philox
from .filters import BINS, categorical_cuts_kernel
from .logit_tiles import INF, MAX_VOCAB, NONE, TILE, cut_of, output_row, read_tile, two_artanh, warmth
from .row_draws import coin53, draw_by_mass, exponentials, race_tile, tile_dot

DRAW_DOMAIN = tl.constexpr(streams.domain_word(streams.CATEGORICAL, 32))


@triton.jit
def categorical_stats_kernel(
    chosen_ptr, rows: tl.int64, tiles, temperature_ptr, max_ptr, second_ptr, sum_ptr, dot_ptr, nan_ptr, value_ptr,
    last_ptr, logits_ptr, stride: tl.int64, V: tl.int64, uncond_ptr, uncond_stride: tl.int64, scale_ptr, exclude_ptr,
    num_exclude, bitmask_ptr, words: tl.int64, col_offset: tl.int64, WARM_ROWS: tl.constexpr, FACTS: tl.constexpr,
):  # fmt: skip
    """(max, Σ exp((z − max) / T)) of a tile, with FACTS the runner-up and Σ exp(x) x too."""
    unit = tl.program_id(0).to(tl.int64)
    out = unit // tiles
    row, valid = output_row(chosen_ptr, out, rows)
    t, _greedy = warmth(temperature_ptr, row, WARM_ROWS)
    value, last = cut_of(value_ptr, last_ptr, out)
    z, nan = read_tile(
        row, valid, unit - out * tiles, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr,
        exclude_ptr, num_exclude, bitmask_ptr, words, col_offset,
    )  # fmt: skip
    top, x, e = exponentials(z, t)
    tl.store(max_ptr + unit, top)
    tl.store(sum_ptr + unit, tl.sum(e, 0).to(tl.float64))
    if FACTS:
        several = tl.sum((z == top).to(tl.int32), 0) > 1
        tl.store(second_ptr + unit, tl.where(several, top, tl.max(tl.where(z == top, -INF, z), 0)))
        tl.store(dot_ptr + unit, tile_dot(e, x))
        tl.store(nan_ptr + unit, nan)


@triton.jit
def categorical_race_kernel(
    chosen_ptr, rows: tl.int64, tiles, draws: tl.int64, key_ptr, rows_per_key: tl.int64, row_offset: tl.int64,
    temperature_ptr, score_ptr, token_ptr, value_ptr, last_ptr, logits_ptr, stride: tl.int64, V: tl.int64, uncond_ptr,
    uncond_stride: tl.int64, scale_ptr, exclude_ptr, num_exclude, bitmask_ptr, words: tl.int64, col_offset: tl.int64,
    WARM_ROWS: tl.constexpr,
):  # fmt: skip
    """The winner of a tile."""
    unit = tl.program_id(0).to(tl.int64)
    tile, draw = unit % tiles, (unit // tiles) % draws
    out = unit // tiles // draws
    row, valid = output_row(chosen_ptr, out, rows)
    t, greedy = warmth(temperature_ptr, row, WARM_ROWS)
    value, last = cut_of(value_ptr, last_ptr, out)
    z, _nan = read_tile(
        row, valid, tile, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr,
        num_exclude, bitmask_ptr, words, col_offset,
    )  # fmt: skip
    group = row // rows_per_key
    key = tl.load(key_ptr + group)
    i, s = (row - group * rows_per_key + row_offset).to(tl.uint32), draw.to(tl.uint32)
    best, winner = race_tile(z, tile, col_offset, key, i, s, t, greedy)
    tl.store(score_ptr + unit, best)
    tl.store(token_ptr + unit, winner)


@triton.jit
def log1p(x):
    """Of x ≥ 0, also where 1 + x is 1."""
    return tl.where(x < 0.25, two_artanh(x / (2.0 + x)), tl.log(1.0 + x))


@triton.jit
def log_ratio(a, b):
    """log(a / b) for a > 0, inf where b is 0."""
    return tl.where(b > 0, tl.log(a / tl.where(b > 0, b, 1.0)), INF)


@triton.jit
def first_equal(
    row_max, tops, row, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr,
    num_exclude, bitmask_ptr, words, col_offset,
):  # fmt: skip
    """The first token with the greatest logit."""
    tile = tl.min(tl.where(tops == row_max, tl.arange(0, tops.shape[0]), NONE), 0)
    z, _nan = read_tile(
        row, True, tile, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr,
        num_exclude, bitmask_ptr, words, col_offset,
    )  # fmt: skip
    return tile.to(tl.int64) * TILE + tl.min(tl.where(z == row_max, tl.arange(0, TILE), NONE), 0)


@triton.jit
def mass_beside(
    token, mass, row_max, inverse, row, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr,
    exclude_ptr, num_exclude, bitmask_ptr, words, col_offset,
):  # fmt: skip
    """Sum of exp((z − max) / T) over all tokens but one, never as a difference; (z − max) / T of that one."""
    tile = token // TILE
    z, _nan = read_tile(
        row, True, tile, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr,
        num_exclude, bitmask_ptr, words, col_offset,
    )  # fmt: skip
    x = (z.to(tl.float64) - row_max) * inverse
    own = tl.arange(0, TILE) == token % TILE
    others = tl.sum(tl.where(tl.arange(0, mass.shape[0]) == tile, 0.0, mass), 0)
    return others + tl.sum(tl.where(own, 0.0, tl.exp(x)), 0), tl.max(tl.where(own, x, -INF), 0)


@triton.jit
def categorical_draw_kernel(
    chosen_ptr, rows: tl.int64, tiles, draws: tl.int64, key_ptr, rows_per_key: tl.int64, row_offset: tl.int64,
    temperature_ptr, max_ptr, second_ptr, sum_ptr, dot_ptr, nan_ptr, value_ptr, last_ptr, racer_score_ptr,
    racer_token_ptr, out_token_ptr, out_score_ptr, logprob_ptr, log_odds_ptr, margin_ptr, entropy_ptr, logsumexp_ptr,
    logits_ptr, stride: tl.int64, V: tl.int64, uncond_ptr, uncond_stride: tl.int64, scale_ptr, exclude_ptr, num_exclude,
    bitmask_ptr, words: tl.int64, col_offset: tl.int64, WARM_ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    out = unit // draws
    draw = unit - out * draws
    row, valid = output_row(chosen_ptr, out, rows)
    t, greedy = warmth(temperature_ptr, row, WARM_ROWS)
    inverse = 1.0 / t
    value, last = cut_of(value_ptr, last_ptr, out)
    index = tl.arange(0, TILES)
    inside = index < tiles
    token = tl.zeros([], tl.int64)
    row_max = tl.full([], -INF, tl.float32)
    if max_ptr is not None:
        tops = tl.load(max_ptr + out * tiles + index, mask=inside, other=-INF)
        row_max = tl.max(tops, 0)
        sums = tl.load(sum_ptr + out * tiles + index, mask=inside, other=0.0)
    finite = valid & (row_max > -INF) & (row_max < INF)
    if racer_score_ptr is not None:
        scores = tl.load(racer_score_ptr + unit * tiles + index, mask=inside, other=-INF)
        tokens = tl.load(racer_token_ptr + unit * tiles + index, mask=inside, other=MAX_VOCAB)
        best = tl.max(scores, 0)
        token = tl.min(tl.where(inside & (scores == best), tokens, MAX_VOCAB), 0)
        if out_score_ptr is not None:
            tl.store(out_score_ptr + unit, tl.where(valid, best, float("nan")))
    elif finite & (greedy == 0):
        group = row // rows_per_key
        i = (row - group * rows_per_key + row_offset).to(tl.uint32)
        r0, r1, r2, r3 = tl.philox(
            tl.load(key_ptr + group), i ^ i, i, draw.to(tl.uint32), DRAW_DOMAIN, philox.WORD_ROUNDS
        )
        u, v = coin53(r0, r1), coin53(r2, r3)
        token, sums = draw_by_mass(
            u, v, -1, tops, sums, row_max, inverse, tiles, row, valid, value, last, logits_ptr, stride, V, uncond_ptr,
            uncond_stride, scale_ptr, exclude_ptr, num_exclude, bitmask_ptr, words, col_offset,
        )  # fmt: skip
    elif valid & (row_max > -INF):
        token = first_equal(
            row_max, tops, row, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr, exclude_ptr,
            num_exclude, bitmask_ptr, words, col_offset,
        )  # fmt: skip
    tl.store(out_token_ptr + unit, tl.where(valid, col_offset + token, -1))

    if margin_ptr is not None:
        certain = valid & (row_max == INF)
        margin, log_odds = tl.where(certain, INF, float("nan")).to(tl.float64), tl.zeros([], tl.float64)
        log_odds += margin
        entropy = tl.where(certain, 0.0, float("nan")).to(tl.float64)
        logprob, logsumexp = entropy + 0.0, row_max.to(tl.float64)
        if finite:
            x = tl.where(sums > 0, (tops.to(tl.float64) - row_max) * inverse, 0.0)
            share = tl.where(sums > 0, tl.exp(x), 0.0)
            likeliest = first_equal(
                row_max, tops, row, value, last, logits_ptr, stride, V, uncond_ptr, uncond_stride, scale_ptr,
                exclude_ptr, num_exclude, bitmask_ptr, words, col_offset,
            )  # fmt: skip
            rest, _x_best = mass_beside(
                likeliest, sums * share, row_max, inverse, row, value, last, logits_ptr, stride, V, uncond_ptr,
                uncond_stride, scale_ptr, exclude_ptr, num_exclude, bitmask_ptr, words, col_offset,
            )  # fmt: skip
            beside, x_token = mass_beside(
                token, sums * share, row_max, inverse, row, value, last, logits_ptr, stride, V, uncond_ptr,
                uncond_stride, scale_ptr, exclude_ptr, num_exclude, bitmask_ptr, words, col_offset,
            )  # fmt: skip
            seconds = tl.load(second_ptr + out * tiles + index, mask=inside, other=-INF)
            seconds = tl.where(index == likeliest // TILE, seconds, tops)
            second = tl.max(tl.exp((seconds.to(tl.float64) - row_max) * inverse), 0)
            dots = tl.load(dot_ptr + out * tiles + index, mask=inside, other=0.0)
            log_total = log1p(rest)
            margin = log_ratio(2.0 + rest - second, rest + second)
            entropy = log_total - tl.sum(share * (dots + x * sums), 0) / (1.0 + rest)
            logprob, log_odds = x_token - log_total, x_token + log_ratio(1.0 + beside * 0.0, beside)
            logsumexp = row_max / t + log_total
        nan = tl.max(tl.load(nan_ptr + out * tiles + index, mask=inside, other=0), 0)
        logsumexp = tl.where(valid & (nan == 0), logsumexp, float("nan"))
        tl.store(logprob_ptr + unit, logprob.to(tl.float32))
        tl.store(log_odds_ptr + unit, log_odds.to(tl.float32))
        tl.store(margin_ptr + out, margin.to(tl.float32), mask=draw == 0)
        tl.store(entropy_ptr + out, entropy.to(tl.float32), mask=draw == 0)
        tl.store(logsumexp_ptr + out, logsumexp.to(tl.float32), mask=draw == 0)


def _ids(op, name, ids, device):
    if ids is None:
        return None
    _sampling.integers(op, name, ids, torch.int64, device)
    if ids.dim() != 1:
        raise ValueError(f"{op}: {name} must have one dimension, got {tuple(ids.shape)}")
    return ids.contiguous()


def _run(
    op, logits, key, temperature, top_k, top_p, min_p, exclude, bitmask, uncond_logits, cfg_scale, rows, num_samples,
    race, row_offset, col_offset=0, facts=False, scores=False,
):  # fmt: skip
    """tokens, score (of a race alone), logprob, log_odds, margin, entropy, logsumexp; None what was not asked for."""
    launch.floating(op, logits=logits, uncond_logits=uncond_logits)
    launch.at_least_one_dimension(op, logits=logits)
    device, flat = logits.device, launch.unit_stride_matrix(logits)
    n, vocab = flat.shape
    if not 1 <= vocab <= _sampling.MAX_VOCAB:
        raise ValueError(f"{op}: logits must have shape (…, V) with V in [1, 2**20], got {tuple(logits.shape)}")
    draws = 1 if num_samples is None else num_samples
    if not 1 <= draws < 2**32:
        raise ValueError(f"{op}: num_samples must be in [1, 2**32), got {draws}")
    _checks.key_tensor(op, key, n, device)
    _checks.stream_range(op, n, vocab, row_offset, col_offset)
    if col_offset % 4 or col_offset > 2**34 - vocab:
        raise ValueError(f"{op}: col_offset must be a multiple of 4 in [0, 2**34 - V], got {col_offset}")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"{op}: cfg_scale must be finite, got {cfg_scale}")
    t, k, p, least = (
        launch.parameter(op, name, value, n, device)
        for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p))
    )
    exclude, chosen = _ids(op, "exclude", exclude, device), _ids(op, "rows", rows, device)
    words = (vocab + 31) // 32
    if bitmask is not None:
        _sampling.integers(op, "bitmask", bitmask, torch.int32, device)
        _checks.shape(op, "bitmask", bitmask, (n, words), "(rows, ⌈V/32⌉)")
        bitmask = bitmask.contiguous()
    uncond = None
    if uncond_logits is not None:
        _checks.shape(op, "uncond_logits", uncond_logits, tuple(logits.shape), "(…, V)")
        uncond = launch.unit_stride_matrix(uncond_logits)
    count = n if chosen is None else chosen.numel()
    tiles = triton.cdiv(vocab, TILE.value)

    def out(per_draw, dtype):
        shape = tuple(logits.shape[:-1]) if chosen is None else tuple(chosen.shape)
        return torch.empty(
            (*shape, draws) if per_draw and num_samples is not None else shape, dtype=dtype, device=device
        )

    def workspace(wanted, dtype, *shape):
        return torch.empty(shape, dtype=dtype, device=device) if wanted else None

    tokens, score = out(True, torch.int64), out(True, torch.float64) if scores else None
    outputs = [out(per_draw, torch.float32) if facts else None for per_draw in (True, True, False, False, False)]
    filters = not (k is None and p is None and least is None)
    measured = filters or facts or not race
    if count:
        top, second = workspace(measured, torch.float32, count, tiles), workspace(facts, torch.float32, count, tiles)
        total, dot = workspace(measured, torch.float64, count, tiles), workspace(facts, torch.float64, count, tiles)
        nan = workspace(facts, torch.int32, count, tiles)
        value, last = workspace(filters, torch.float32, count), workspace(filters, torch.int64, count)
        common = (
            flat, flat.stride(0), vocab, uncond, 0 if uncond is None else uncond.stride(0),
            None if uncond is None else torch.full((), cfg_scale + 1, dtype=torch.float32, device=device), exclude,
            0 if exclude is None else exclude.numel(), bitmask, words, col_offset,
        )  # fmt: skip
        options = {"WARM_ROWS": t.dim() == 1, "enable_fp_fusion": False}
        spread = {"TILES": triton.next_power_of_2(tiles)}

        def measure(*cut):
            categorical_stats_kernel[(count * tiles,)](
                chosen, n, tiles, t, top, second, total, dot, nan, *cut, *common, FACTS=facts, **options
            )

        if measured:
            measure(None, None)
        if filters:
            bins = workspace(True, torch.int64, count, BINS.value)
            rowwise = {
                f"{name}_ROWS": x is not None and x.dim() == 1 for name, x in (("K", k), ("P", p), ("MIN", least))
            }
            categorical_cuts_kernel[(count,)](
                chosen,
                n,
                tiles,
                t,
                top,
                total,
                value,
                last,
                bins,
                k,
                p,
                least,
                *common,
                None,
                **rowwise,
                **options,
                **spread,
            )
            measure(value, last)  # a NaN is seen before the cut is
        stream = (key.contiguous(), max(n // key.numel(), 1), row_offset)
        racers = [workspace(race, dtype, count * draws, tiles) for dtype in (torch.float64, torch.int64)]
        if race:
            categorical_race_kernel[(count * draws * tiles,)](
                chosen, n, tiles, draws, *stream, t, *racers, value, last, *common, **options
            )
        categorical_draw_kernel[(count * draws,)](
            chosen, n, tiles, draws, *stream, t, top, second, total, dot, nan, value, last, *racers, tokens, score,
            *outputs, *common, **options, **spread,
        )  # fmt: skip
    return tokens, score, *outputs


_ARGUMENTS = (
    "Tensor logits, Tensor key, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? exclude,"
    " Tensor? bitmask, Tensor? uncond_logits, float cfg_scale, Tensor? rows, int? num_samples, str method,"
    " SymInt row_offset"
)


def _race(op, method):
    if method not in ("cdf", "race"):
        raise ValueError(f"{op}: method must be 'cdf' or 'race', got {method!r}")
    return method == "race"


@launch.op(f"categorical_sample({_ARGUMENTS}) -> Tensor")
def categorical_sample(logits, key, *arguments):
    *arguments, method, row_offset = arguments
    race = _race("categorical_sample", method)
    return _run("categorical_sample", logits, key, *arguments, race, row_offset)[0]


@launch.op(f"categorical_sample_with_stats({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def categorical_sample_with_stats(logits, key, *arguments):
    *arguments, method, row_offset = arguments
    race = _race("categorical_sample_with_stats", method)
    tokens, _, *facts = _run("categorical_sample_with_stats", logits, key, *arguments, race, row_offset, facts=True)
    return tokens, *facts


@launch.op(
    "categorical_race(Tensor logits, Tensor key, Tensor temperature, Tensor? exclude, Tensor? bitmask,"
    " Tensor? uncond_logits, float cfg_scale, Tensor? rows, int? num_samples, SymInt row_offset, SymInt col_offset)"
    " -> (Tensor, Tensor)"
)
def categorical_race(logits, key, temperature, *arguments):
    *arguments, row_offset, col_offset = arguments
    none = (None, None, None)
    return _run(
        "categorical_race", logits, key, temperature, *none, *arguments, True, row_offset, col_offset, scores=True
    )[:2]
