// A block at work on one request: verdicts a warp a place, sums and draws all together. What warps
// return here is the same in all of them.
#pragma once
#include "accept_request.cuh"

namespace randfuse::cuda {

inline constexpr int kTeamWarps = 12;  // at most: 168 registers a thread

template <class T>
struct LawPair {  // of a place
  LawRow<T> p, q;
};

// Shared memory of a block, 38 KB. Laws lie there, for two of them would not fit the registers.
template <class T>
struct TeamMemory : LawPair<T> {  // of the place at hand
  AcceptFacts facts;
  LawPair<T> laws[kTeamWarps];
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

  // The laws of place j, which are known, by one warp.
  RF_DEVICE void look(int64_t j, LawPair<T>* laws) const {
    const LawRow<T> p = request.target(j, true);
    if (leads()) laws->p = p;
    const LawRow<T> q = request.draft(j, true);
    if (leads()) laws->q = q;
    __syncwarp();
  }
  RF_DEVICE void open(const LawPair<T>& laws) const {
    __syncthreads();
    if (threadIdx.x == 0) memory.p = laws.p, memory.q = laws.q;
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

  // Statistics of tiles that the first launch did not take.
  RF_DEVICE void measure(const AcceptRow<T>& row, TileStats<float>* stats, int first,
                         int count) const {
    for_each_tile(count, [&](int t) {
      const TileStats<float> own = stats_of(row, first + t);
      if (leads()) stats[first + t] = own;
    });
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

  // The rows of place j of which nothing was saved and that the first launch left out.
  RF_DEVICE void measure_missing(int64_t j) const {
    const AcceptRequest<T>& r = request;
    const bool p = !r.a.target_ahead() && !r.adopts_target(j);
    const bool q = j < r.drafts && r.has_draft_rows() && !r.a.draft_ahead() && !r.adopts_draft(j);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      if (side == 0 ? !p : !q) continue;
      const AcceptRow<T> row = side == 0 ? r.target_row(j) : r.draft_row(j);
      measure(row, side == 0 ? r.target_stats(j) : r.draft_stats(j), 0, row.tiles());
    }
  }

  // Sums in float64, where those in float32 leave a decision open: of p, of q, and in mode typical
  // of x exp(x) under p.
  RF_DEVICE void make_exact() const {
    const bool typical = request.a.mode == AcceptMode::kTypical;
#pragma unroll 1
    for (int step = 0; step < 3; ++step) {
      LawRow<T>& row = step == 1 ? memory.q : memory.p;
      double* const sums = step == 0 ? memory.target : memory.draft;
      const bool dots = step == 2;
      if (dots ? !typical : row.exact || !row.tiles) continue;
      for_each_tile(row.count, [&](int t) {
        const double sum = row.exact_part(t, dots);
        if (leads()) sums[t] = sum;
      });
      const double whole = dots ? row.dot_of(memory.target, memory.draft) : row.total_of(sums);
      __syncthreads();
      if (threadIdx.x == 0) row.learn(whole, dots);
    }
    __syncthreads();
  }

  // A draw from the target's law at place j, without `banned`.
  RF_DEVICE int64_t draw(int64_t j, int64_t banned) const {
    const AcceptRequest<T>& r = request;
    AcceptRow<T> row = r.target_row(j);
    row.banned = banned;
    TileStats<float>* stats = r.target_stats(j);
    if (!r.a.target_ahead() && r.adopts_target(j)) {
      measure(row, stats, 0, row.tiles());
    } else if (banned >= 0) {
      measure(row, stats, static_cast<int>(banned / kTile), 1);
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
      const RowDraws<AcceptRow<T>> p(row, stats, r.facts.temperature);
      for_each_tile(p.count, [&](int t) {
        const double sum = p.exact_sum(t);
        if (leads()) memory.target[t] = sum;
      });
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

 private:
  RF_DEVICE static TileStats<float> stats_of(const AcceptRow<T>& row, int tile) {
    TileStats<float> stats{-INFINITY, -INFINITY, 0.0, 0.0, false};
    const float slope = static_cast<float>(1.4426950408889634 / row.temperature);
    float sum = 0.0f;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {  // one loop over logits, which is long
      row.template for_each_logit<row.kAtOnce>(tile, [&](int64_t, float z) {
        if (pass == 0) {
          stats.max = fmaxf(stats.max, z);
          stats.has_nan = stats.has_nan || z != z;
        } else {
          sum += exp2_approx((fmaxf(z, -INFINITY) - stats.max) * slope);
        }
      });
      stats.max = warp_max(stats.max);
      if (stats.max - stats.max != 0.0f) break;
    }
    stats.has_nan = __ballot_sync(kAll, stats.has_nan) != 0;
    stats.sum = warp_sum(sum);
    return stats;
  }
};

}  // namespace randfuse::cuda
