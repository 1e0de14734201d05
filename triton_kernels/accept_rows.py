"""The rows of a request of speculative acceptance, where they lie: ragged, masked, mapped to the target's tokens."""

import triton
import triton.language as tl
from randfuse.reference.speculative_accept import BAD_ID

from .logit_tiles import INF, MAX_VOCAB, TILE, read_tile, warmth

BAD_ID = tl.constexpr(BAD_ID)


@triton.jit
def request_of(b, ids_ptr, count_ptr, cu_ptr, rows, K, V, IDS: tl.constexpr):
    """First row, number of rows, drafts (IDS,) with −1 after the last that can be verified, their number, what to flag.

    Values in device memory cannot be refused: they are brought into their ranges.
    """
    if cu_ptr is None:
        first, own = b * (K + 1), K + 1
    else:
        first = tl.maximum(tl.load(cu_ptr + b), 0)
        own = tl.minimum(tl.maximum(tl.minimum(tl.load(cu_ptr + b + 1), rows) - first, 0), K + 1)
    given = own - 1
    if count_ptr is not None:
        given = tl.minimum(tl.maximum(tl.load(count_ptr + b), 0), K)
    index = tl.arange(0, IDS)
    ids = tl.load(ids_ptr + b * K + index, mask=index < given, other=-1)
    drafts = tl.min(tl.where((ids >= 0) & (ids < V), IDS, index), 0)  # index K is none
    bad = tl.max(tl.where((index == drafts) & (ids != -1), BAD_ID, 0), 0)
    return first, own, tl.where(index < drafts, ids, -1), drafts, bad


@triton.jit
def temperatures(b, target_ptr, draft_ptr, WARM: tl.constexpr, DRAFT_WARM: tl.constexpr):
    t, greedy = warmth(target_ptr, b, WARM)
    if draft_ptr is None:
        return t, greedy, t, greedy
    else:
        draft_t, draft_greedy = warmth(draft_ptr, b, DRAFT_WARM)
        return t, greedy, draft_t, draft_greedy


@triton.jit
def saved_of(lse_ptr, at, wanted, t):
    """A log-sum-exp that was saved, NaN where there is none that will do."""
    if lse_ptr is None:
        return tl.full([], float("nan"), tl.float64)
    else:
        saved = tl.load(lse_ptr + at, mask=wanted, other=float("nan")).to(tl.float64)
        return tl.where(tl.abs((saved * t).to(tl.float32)) < INF, saved, float("nan"))


@triton.jit
def element(values, j):
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == j, values, 0), 0)


@triton.jit
def target_row(b, first, j, target_ptr, stride_b, stride_j, cu_ptr):
    return target_ptr + (b * stride_b if cu_ptr is None else first * stride_j) + j * stride_j


@triton.jit
def read_target(tile, row, valid, value, last, row_ptr, V, bitmask_ptr, words):
    return read_tile(row, valid, tile, value, last, row_ptr, 0, V, None, 0, None, None, 0, bitmask_ptr, words, 0)


@triton.jit
def joined(a, b, t):
    """The logit whose probability is that of a and b together: T log(exp(a / T) + exp(b / T))."""
    high, low = tl.where(a > b, a, b), tl.where(a > b, b, a)
    plain = (low == -INF) | (high == INF)
    gap = tl.where(plain, 0.0, low.to(tl.float64) - tl.where(plain, 0.0, high))
    both = (high.to(tl.float64) + t * tl.log(1.0 + tl.exp(gap / t))).to(tl.float32)
    return tl.where((a != a) | (b != b), float("nan"), tl.where(plain, high, both))


@triton.jit
def read_draft(tile, t, logits_ptr, V, begin_ptr, column_ptr):
    """A tile of the draft over the target's tokens: read_tile, or through a map the logits of each token, added up."""
    if begin_ptr is None:
        return read_tile(tile, True, tile, -INF, MAX_VOCAB, logits_ptr, 0, V, None, 0, None, None, 0, None, 0, 0)
    else:
        token = tile * TILE + tl.arange(0, TILE)
        begin = tl.load(begin_ptr + token, mask=token < V, other=0)
        count = tl.load(begin_ptr + token + 1, mask=token < V, other=0) - begin
        z = tl.full([TILE], -INF, tl.float32)
        for k in range(0, tl.max(count, 0)):
            column = tl.load(column_ptr + begin + k, mask=k < count, other=0)
            z = joined(z, tl.load(logits_ptr + column, mask=k < count, other=-INF).to(tl.float32), t)
        return tl.where(z == z, z, -INF), tl.max((z != z).to(tl.int32), 0)
