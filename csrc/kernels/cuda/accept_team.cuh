// A block at work on one request: verdicts a warp a place, sums and draws all together. What warps
// return here is the same in all of them.
#pragma once
#include "accept_request.cuh"

namespace randfuse::cuda {

inline constexpr int kTeamWarps = 16;  // at most

// Shared memory of a block, 34 KB. What all warps have in common lies there, not in registers.
template <class T>
struct TeamMemory {
  AcceptFacts facts;
  LawRow<T> p, q;  // of the place at hand
  Verdict verdicts[kTeamWarps];
  int64_t token;
  double target[kMaxTiles], draft[kMaxTiles], residual[kMaxTiles];  // sums in float64, masses
  double left[SharedTile::kSize];                                   // a tile of one warp
};

template <class T>
struct AcceptTeam {
  const AcceptRequest<T> request;
  TeamMemory<T>& memory;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;

  // The rows of place j, which are known.
  RF_DEVICE void open(int64_t j) const {
    __syncthreads();
    if (warp == 0) {
      const LawRow<T> p = request.target(j, true), q = request.draft(j, true);
      if (leads()) memory.p = p, memory.q = q;
    }
    __syncthreads();
  }

  // body(tile) of every tile, shared by the warps; memory is free before and filled after.
  template <class Body>
  RF_DEVICE void for_each_tile(int count, const Body& body) const {
    __syncthreads();
#pragma unroll 1
    for (int t = warp; t < count; t += warps) body(t);
    __syncthreads();
  }
  RF_DEVICE static bool leads() { return threadIdx.x % 32 == 0; }

  // Statistics of a tile that the first launch did not take.
  RF_DEVICE static TileStats<float> stats_of(const AcceptRow<T>& row, int tile) {
    TileStats<float> stats{-INFINITY, -INFINITY, 0.0, 0.0, false};
    const double inverse = 1.0 / row.temperature;
    const float slope = static_cast<float>(1.4426950408889634 * inverse);
    row.template for_each_logit<row.kAtOnce>(tile, [&](int64_t, float z) {
      stats.max = fmaxf(stats.max, z);
      stats.has_nan = stats.has_nan || z != z;
    });
    stats.max = warp_max(stats.max);
    stats.has_nan = __ballot_sync(kAll, stats.has_nan) != 0;
    if (stats.max - stats.max != 0.0f) return stats;
    if (stats.has_nan) {
      stats.sum = row.weigh(tile, RowWeight{stats.max, inverse});
    } else {
      float sum = 0.0f;
      row.template for_each_logit<row.kAtOnce>(
          tile, [&](int64_t, float z) { sum += exp2_approx((z - stats.max) * slope); });
      stats.sum = warp_sum(sum);
    }
    return stats;
  }

  // What warp 0 finds out, to all.
  template <class Find>
  RF_DEVICE int64_t by_one_warp(const Find& find) const {
    __syncthreads();
    if (warp == 0) {
      const int64_t found = find();
      if (leads()) memory.token = found;
    }
    __syncthreads();
    return memory.token;
  }

  // The rows of place j that the first launch left out: those of which nothing was saved, or, for a
  // draw, the target's.
  RF_DEVICE void measure_missing(int64_t j, bool for_draw) const {
    const AcceptRequest<T>& r = request;
    const bool p = !LawRow<T>::adopts(r.saved_target(j), r.facts.temperature);
    const bool q = j < r.drafts && r.has_draft_rows() && !r.a.draft_ahead() &&
                   !LawRow<T>::adopts(r.saved_draft(j), r.facts.draft_temperature);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      if (side == 0 ? r.a.target_ahead() || p == for_draw : for_draw || !q) continue;
      const AcceptRow<T> row = side == 0 ? r.target_row(j) : r.draft_row(j);
      TileStats<float>* stats = side == 0 ? r.target_stats(j) : r.draft_stats(j);
      for_each_tile(row.tiles(), [&](int t) {
        const TileStats<float> own = stats_of(row, t);
        if (leads()) stats[t] = own;
      });
    }
  }

  // Sums in float64, where those in float32 leave a decision open.
  RF_DEVICE void make_exact() const {
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      LawRow<T>& row = side == 0 ? memory.p : memory.q;
      double* const sums = side == 0 ? memory.target : memory.draft;
      if (row.exact || !row.tiles) continue;
      take_sums(row, sums);
      double total = 0.0;
#pragma unroll 1
      for (int t = threadIdx.x % 32; t < row.count; t += 32) total += row.exact_mass(t, sums);
      total = warp_sum(total);
      __syncthreads();
      if (threadIdx.x == 0) row.total = total, row.exact = true;
    }
    __syncthreads();
    LawRow<T>& p = memory.p;
    if (request.a.mode != AcceptMode::kTypical) return;
    for_each_tile(p.count, [&](int t) {
      const double dot = p.exact_dot(t);
      if (leads()) memory.draft[t] = dot;
    });
    const double dot = p.dot_of([&](int t, double* sum, double* own) {
      *sum = memory.target[t];
      *own = memory.draft[t];
    });
    if (threadIdx.x == 0) p.dot = dot;
    __syncthreads();
  }
  RF_DEVICE void take_sums(const RowDraws<AcceptRow<T>>& row, double* sums) const {
    for_each_tile(row.count, [&](int t) {
      const double sum = row.exact_sum(t);
      if (leads()) sums[t] = sum;
    });
  }

  // A draw from the target's law at place j, without `banned`.
  RF_DEVICE int64_t draw(int64_t j, int64_t banned) const {
    const AcceptRequest<T>& r = request;
    AcceptRow<T> row = r.target_row(j);
    TileStats<float>* stats = r.target_stats(j);
    measure_missing(j, true);
    if (banned >= 0) {
      const int own = static_cast<int>(banned / kTile);
      row.banned = banned;
      __syncthreads();
      if (warp == 0) {
        const TileStats<float> left = stats_of(row, own);
        if (leads()) stats[own] = left;
      }
      __syncthreads();
    }
    const Words words = r.last_words();
    const double u = coin53(words.r[0], words.r[1]), v = coin53(words.r[2], words.r[3]);
#pragma unroll 1
    for (bool exact = false;; exact = true) {
      const int64_t token = by_one_warp([&]() -> int64_t {
        const RowDraws<AcceptRow<T>> p(row, stats, r.facts.temperature);
        if (!p.finite()) return banned;
        const int tile = exact ? p.tile_of(u, memory.target) : p.tile_of(u);
        return tile < 0 ? -1 : p.token_in(tile, v, SharedTile(memory.left));
      });
      if (token >= 0) return token;
      take_sums({row, stats, r.facts.temperature}, memory.target);
    }
  }

  RF_DEVICE void emit(int64_t j, int64_t token, float logprob) const {  // one thread
    const int64_t at = request.b * (request.a.drafts + 1) + j;
    request.a.tokens[at] = token;
    request.a.logprobs[at] = logprob;
  }
  // The last token, and padding after it.
  RF_DEVICE void stop(int64_t j, int64_t token, int64_t status) const {
    const float logprob = memory.p.logprob(memory.p.row.logit(token));
    __syncthreads();  // after what was emitted before it was known where to stop
#pragma unroll 1
    for (int64_t i = j + 1 + threadIdx.x; i <= request.a.drafts; i += blockDim.x) emit(i, -1, 0.0f);
    if (threadIdx.x != 0) return;
    emit(j, token, logprob);
    request.a.num_accepted[request.b] = j;
    request.a.status[request.b] = status | (j == request.drafts ? request.facts.after_last : 0);
  }
};

}  // namespace randfuse::cuda
