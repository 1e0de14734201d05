// One row of logits as acceptance looks at it, and the law that it is.
#pragma once
#include "row_stats.cuh"
#include "speculative_accept.h"

namespace randfuse::cuda {

// A row of the target or the draft, as a warp reads it. By value: a pointer to a kernel's argument,
// once stored, would move the arguments to local memory.
template <class T>
struct AcceptRow {
  const T* logits;
  int64_t vocab;
  const int32_t* bits;  // bit set = allowed; may be null
  Cut<float> cut;
  ColumnMap columns;
  double temperature;   // at which columns of one token add up
  int64_t banned = -1;  // a token that is left out

  RF_DEVICE AcceptRow(const LogitRows<T>& rows, int64_t offset, int64_t row, const ColumnMap& map,
                      double t)
      : logits(rows.logits + offset),
        vocab(rows.vocab),
        bits(rows.bitmask ? rows.bitmask + row * rows.bitmask_words : nullptr),
        cut(no_cut()),
        columns(map),
        temperature(t) {}

  RF_DEVICE int tiles() const { return static_cast<int>((vocab + kTile - 1) / kTile); }

  // A whole tile, every load on its way at once: for the pass that reads all rows.
  template <int kRun>
  RF_DEVICE WarpTile<T, kRun> read(int tile) const {
    if (columns.starts) return {alone(), 0, tile, columns, temperature};
    return {alone(), 0, tile, cut};
  }
  RF_DEVICE LogitRows<T> alone() const {  // a matrix of this row
    return {logits, 0, 1, vocab, nullptr, 0, 0.0f, nullptr, 0, bits, 0, 0};
  }

  // For all else, a few logits at a time.
  static constexpr int kAtOnce = 8;
  RF_DEVICE float logit(int64_t token) const {
    return columns.starts ? joined_columns(logits, columns, token, temperature) : plain(token);
  }
  RF_DEVICE float plain(int64_t token) const {  // where a column is a token
    const float z = widen(logits + token);
    const bool allowed = !bits || (bits[token / 32] >> (token % 32) & 1);
    const bool cuts = cut.value > -INFINITY && !cut.keeps(z, token);
    return allowed && !cuts && token != banned ? z : -INFINITY;
  }
  // Every 32nd from `token` on. One copy of what adds columns up, which is long.
  RF_DEVICE void load(int64_t token, int64_t end, float (&z)[kAtOnce]) const {
    if (!columns.starts) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        z[k] = token + 32 * k < end ? plain(token + 32 * k) : -INFINITY;
      return;
    }
#pragma unroll 1
    for (int k = 0; k < kAtOnce; ++k, token += 32, rotate<1>(z))
      z[0] = token < end ? joined_columns(logits, columns, token, temperature) : -INFINITY;
  }
  // body(token, logit) of a lane's tokens of a tile; `kCopies` of the body, 1 where it is long.
  template <int kCopies, class Body>
  RF_DEVICE void for_each_logit(int tile, const Body& body) const {
    const int64_t first = int64_t{tile} * kTile, end = min(first + kTile, vocab);
#pragma unroll 1
    for (int64_t t = first + threadIdx.x % 32; t < end; t += 32 * kAtOnce) {
      float z[kAtOnce];
      load(t, end, z);
#pragma unroll kCopies
      for (int k = 0; k < kAtOnce; ++k, rotate<1>(z)) {
        const int64_t token = t + 32 * k;
        if (token < end) body(token, z[0]);
      }
    }
  }

  RF_DEVICE int first_equal(int tile, float z) const {
    int first = kTile;
    for_each_logit<1>(tile, [&](int64_t t, float own) {
      first = own == z ? min(first, static_cast<int>(t % kTile)) : first;
    });
    return warp_min(first);
  }
  RF_DEVICE void fill(int tile, const SharedTile& shared) const {
    __syncwarp();
    for (int c = threadIdx.x % 32; c < kTile; c += 32) shared[c] = -INFINITY;
    for_each_logit<1>(tile, [&](int64_t t, float z) { shared[static_cast<int>(t % kTile)] = z; });
    __syncwarp();
  }
  template <class Weight>
  RF_DEVICE double weigh(int tile, const Weight& weight) const {
    double sum = 0.0;
    for_each_logit<1>(tile, [&](int64_t, float z) { sum += weight(z); });
    return warp_sum(sum);
  }
};

// A row and its law: token v has probability exp((z_v - max) / T) / total.
template <class T>
struct LawRow : RowDraws<AcceptRow<T>> {
  using Draws = RowDraws<AcceptRow<T>>;
  double total = 0.0, dot = 0.0;  // dot: sum of x exp(x), x = (z - max) / T, in mode typical
  int exact = 0;                  // the sums are float64's, or a saved log-sum-exp's

  // Known by its tiles, or by log of the sum of exp(z / T) if that is a number, or not yet.
  RF_DEVICE LawRow(const AcceptRow<T>& row, const TileStats<float>* stats, double t, double saved)
      : Draws(row, adopts(saved, t) ? nullptr : stats, t) {
    if (adopts(saved, t)) {
      this->max = static_cast<float>(saved * t);
      total = exp(saved - double{this->max} * this->inverse);
      exact = true;
    } else if (this->tiles) {
      total = this->total_mass();
    }
  }
  RF_DEVICE static bool adopts(double saved, double t) {
    const float max = static_cast<float>(saved * t);
    return max - max == 0.0f;
  }

  RF_DEVICE bool known() const { return this->tiles || exact; }
  RF_DEVICE double probability(float z) const {
    return weight64(z, this->max, this->inverse) / total;
  }
  RF_DEVICE float logprob(float z) const {
    if (!this->finite()) return this->max > 0.0f ? 0.0f : NAN;
    return static_cast<float>((double{z} - double{this->max}) * this->inverse - log(total));
  }
  RF_DEVICE double entropy() const { return log(total) - dot / total; }
  // What a row that was looked at adds to the status.
  RF_DEVICE int64_t flags() const {
    if (!this->tiles) return 0;
    return (this->has_nan ? kNaN : 0) | (this->max == INFINITY ? kPosInf : 0) |
           (this->max == -INFINITY ? kNoSupport : 0);
  }

  // The sum of x exp(x) of the first launch.
  RF_DEVICE double dot_of_tiles() const {
    return gather([&](int t) { return this->tiles[t].sum; },
                  [&](int t) { return this->tiles[t].dot; });
  }
  // By sums over tiles in float64, of exp(x) and of x exp(x): exact_part's.
  RF_DEVICE double dot_of(const double* sums, const double* dots) const {
    return gather([&](int t) { return sums[t]; }, [&](int t) { return dots[t]; });
  }
  RF_DEVICE double total_of(const double* sums) const {
    double whole = 0.0;
#pragma unroll 1
    for (int t = threadIdx.x % 32; t < this->count; t += 32) whole += this->exact_mass(t, sums);
    return warp_sum(whole);
  }
  RF_DEVICE double exact_part(int tile, bool dots) const {
    const float top = this->tiles[tile].max;
    if (top - top != 0.0f) return 0.0;
    return this->row.weigh(tile, [&](float z) {
      const double x = (double{z} - double{top}) * this->inverse, weight = exp64(x);
      return !(weight > 0.0) ? 0.0 : dots ? weight * x : weight;
    });
  }
  RF_DEVICE void learn(double whole, bool dots) {
    (dots ? dot : total) = whole;
    exact = true;
  }

 private:
  template <class Sum, class Dot>
  RF_DEVICE double gather(const Sum& sum_of, const Dot& dot_of) const {
    double whole = 0.0;
#pragma unroll 1
    for (int t = threadIdx.x % 32; t < this->count; t += 32) {
      const double x = (double{this->tiles[t].max} - double{this->max}) * this->inverse;
      const double sum = sum_of(t), scale = sum == 0.0 ? 0.0 : exp64(x);
      if (scale > 0.0) whole += scale * (dot_of(t) + x * sum);
    }
    return warp_sum(whole);
  }
};

}  // namespace randfuse::cuda
