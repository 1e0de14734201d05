// Statistics of tiles, and draws from rows by them: what categorical_sample and speculative_accept
// are made of.
//
// Arithmetic of a tile's statistics per token: a maximum, a difference, a product, ex2 and an
// addition: 5 instructions where the bytes of a bf16 logit allow 12 (sm_90 at 4.8 TB/s).
#pragma once
#include "logit_tiles.cuh"

namespace randfuse::cuda {

struct RowWeight {  // exp((z - max) / T)
  float max;
  double inverse;  // 1 / T
  RF_DEVICE double operator()(float z) const { return weight64(z, max, inverse); }
};

template <class Tile, class Weight>
RF_DEVICE double tile_weight(Tile& tile, const Weight& weight) {
  constexpr int kAtOnce = 4;
  double sum = 0.0;
#pragma unroll 1
  for (int i = 0; i < kPerLane; i += kAtOnce, rotate<kAtOnce>(tile.z)) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sum += weight(tile.z[k]);
  }
  return warp_sum(sum);
}

// The relative error of a sum stays below kSumError: the argument of ex2 has 3 roundings as on the
// CPU, ex2 2^-22, and the sum 8 terms an accumulator and 7 steps across.
template <bool kDot, class Tile>
RF_DEVICE TileStats<float> tile_stats(Tile& tile, double inverse) {
  TileStats<float> stats{-INFINITY, -INFINITY, 0.0, 0.0, false};
  float top = -INFINITY, second = -INFINITY;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    if (kDot) second = fmaxf(second, fminf(top, fmaxf(tile.z[k], -INFINITY)));
    top = fmaxf(top, tile.z[k]);
  }
  stats.max = warp_max(top);
  if (kDot) {
    for (int flip = 16; flip > 0; flip /= 2) {
      const float other = shuffle_xor(top, flip);
      second = fmaxf(fminf(top, other), fmaxf(second, shuffle_xor(second, flip)));
      top = fmaxf(top, other);
    }
    stats.second = second;
  }
  const bool finite = stats.max - stats.max == 0.0f;
  if (finite) {
    const float slope = static_cast<float>(1.4426950408889634 * inverse);
    float sum[4] = {}, dot[4] = {};
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const float x = (tile.z[k] - stats.max) * slope, e = exp2_approx(x);
      sum[k % 4] += e;
      if (kDot) dot[k % 4] += e * fmaxf(-125.0f, x);
    }
    stats.sum = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (kDot)
      stats.dot = 0.6931471805599453 * double{warp_sum((dot[0] + dot[1]) + (dot[2] + dot[3]))};
    if (stats.sum < INFINITY) return stats;
    stats.sum = stats.dot = 0.0;
  }
  bool nan = false;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) nan = nan || tile.z[k] != tile.z[k];
  stats.has_nan = __ballot_sync(kAll, nan) != 0;
  if (!finite) return stats;
  const RowWeight weight{stats.max, inverse};
  stats.sum = tile_weight(tile, weight);
  if (kDot) {
    stats.dot = tile_weight(tile, [&](float z) {
      const double x = (double{z} - double{stats.max}) * inverse, w = exp64(x);
      return w > 0.0 ? w * x : 0.0;
    });
  }
  return stats;
}

// Where a running sum stops. Lanes take ranges that follow one another; their edges are sums of the
// same terms in the same order wherever they are taken, so prefixes never fall and end at `total`.
struct Place {
  int at;
  double before, after, total;
};

// The first place in [0, count) with passes(prefix, total), prefix the sum of weights up to and
// with it; the last that has a weight if none passes.
template <class Weight, class Passes>
RF_DEVICE Place first_place(int count, const Weight& weight, const Passes& passes) {
  const int lane = threadIdx.x % 32, each = (count + 31) / 32;
  const int begin = min(lane * each, count), end = min(begin + each, count);
  double own = 0.0;
  for (int t = begin; t < end; ++t) own += weight(t);
  double total = 0.0, start = 0.0;
#pragma unroll 4
  for (int l = 0; l < 32; ++l) {
    if (l == lane) start = total;
    total += shuffle(own, l);
  }
  Place place{0, 0.0, 0.0, total};
  double sum = 0.0;
  bool found = false, any = false;
  for (int t = begin; t < end && !found; ++t) {
    const double w = weight(t);
    if (w == 0.0) continue;
    any = true;
    place.at = t;
    place.before = start + sum;
    sum += w;
    place.after = start + sum;
    found = passes(place.after, total);
  }
  const uint32_t votes = __ballot_sync(kAll, found), some = __ballot_sync(kAll, any);
  int source = 0;
  if (votes != 0) {
    source = lowest_bit(votes);
  } else {
    for (int l = 0; l < 32; ++l) source = some >> l & 1 ? l : source;
  }
  place.at = shuffle(place.at, source);
  place.before = shuffle(place.before, source);
  place.after = shuffle(place.after, source);
  return place;
}

// A tile in shared memory in the order of its tokens, for a warp: logits, then weights. Lanes work
// on 32 tokens that follow one another; a gap after each 32 keeps them on different banks.
class SharedTile {
 public:
  static constexpr int kSize = kTile + 32;  // doubles

  RF_DEVICE explicit SharedTile(double* memory) : at_(memory) {}
  RF_DEVICE double& operator[](int t) const { return at_[t + t / 32]; }

  template <class T>
  RF_DEVICE void fill(const WarpTile<T, 4>& tile) const {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) (*this)[tile.token(k)] = tile.z[k];
    __syncwarp();
  }

  // Sum of the weights of all tokens but one.
  RF_DEVICE double weigh(const RowWeight& weight, int but = -1) const {
    double sum = 0.0;
    const int begin = threadIdx.x % 32 * 32;
#pragma unroll 4
    for (int t = begin; t < begin + 32; ++t) {
      const double w = t == but ? 0.0 : weight(static_cast<float>((*this)[t]));
      (*this)[t] = w;
      sum += w;
    }
    return warp_sum(sum);
  }

 private:
  double* at_;
};

// A row as a warp reads it.
template <class T>
struct CutRow {
  const LogitRows<T>& rows;
  int64_t row;
  Cut<float> cut;

  RF_DEVICE int tiles() const { return rows.tiles(); }
  RF_DEVICE WarpTile<T, 4> read(int tile) const { return {rows, row, tile, cut}; }
  RF_DEVICE int first_equal(int tile, float z) const { return read(tile).first_equal(z); }
  RF_DEVICE void fill(int tile, const SharedTile& shared) const { shared.fill(read(tile)); }
  RF_DEVICE double weigh(int tile, const RowWeight& weight) const {
    WarpTile<T, 4> logits = read(tile);
    return tile_weight(logits, weight);
  }
};

// A warp's view of one row whose tiles have been measured.
template <class Row>
struct RowDraws {
  Row row;
  const TileStats<float>* tiles;  // (count,); null: nothing was measured
  int count;
  double temperature, inverse;  // > 0; 1 / temperature
  float max = -INFINITY;
  int has_nan = 0;  // nvcc copies the padding after a bool through local memory

  RF_DEVICE RowDraws(const Row& r, const TileStats<float>* stats, double t)
      : row(r), tiles(stats), count(r.tiles()), temperature(t), inverse(1.0 / t) {
    for (int i = threadIdx.x % 32; tiles && i < count; i += 32) {
      max = fmaxf(max, tiles[i].max);
      has_nan = has_nan || tiles[i].has_nan;
    }
    max = warp_max(max);
    has_nan = __ballot_sync(kAll, has_nan) != 0;
  }

  RF_DEVICE bool finite() const { return max - max == 0.0f; }
  RF_DEVICE double mass(int tile) const { return tile_mass(tiles[tile], max, inverse); }
  RF_DEVICE double total_mass() const {
    double whole = 0.0;
#pragma unroll 1
    for (int t = threadIdx.x % 32; t < count; t += 32) whole += mass(t);
    return warp_sum(whole);
  }

  RF_DEVICE int64_t first_maximum() const {
    if (max == -INFINITY) return 0;
    int first = count;
    for (int i = threadIdx.x % 32; i < count; i += 32)
      first = tiles[i].max == max && i < first ? i : first;
    first = warp_min(first);
    return int64_t{first} * kTile + row.first_equal(first, max);
  }

  // The tile in which the running mass passes u times the whole; -1 where only float64 sums of the
  // tiles can tell. The edges at 0 and at the whole do not move.
  RF_DEVICE int tile_of(double u) const {
    const Place p = first_place(
        count, [&](int t) { return mass(t); },
        [&](double prefix, double total) { return prefix > u * total; });
    const double target = u * p.total, slack = kSumError * p.total;
    const bool sure = (p.before == 0.0 || target - p.before >= slack) &&
                      (p.after == p.total || p.after - target >= slack);
    return sure ? p.at : -1;
  }
  // The same by sums that are float64's.
  RF_DEVICE int tile_of(double u, const double* sums) const {
    return first_place(
               count, [&](int t) { return exact_mass(t, sums); },
               [&](double prefix, double total) { return prefix > u * total; })
        .at;
  }
  RF_DEVICE double exact_mass(int t, const double* sums) const {
    return sums[t] == 0.0 ? 0.0 : sums[t] * weight64(tiles[t].max, max, inverse);
  }
  RF_DEVICE double exact_sum(int tile) const {
    const float top = tiles[tile].max;
    if (top - top != 0.0f) return 0.0;
    return row.weigh(tile, RowWeight{top, inverse});
  }

  RF_DEVICE int64_t token_in(int tile, double v, const SharedTile& shared) const {
    row.fill(tile, shared);
    shared.weigh({tiles[tile].max, inverse});
    const Place p = first_place(
        kTile, [&](int t) { return shared[t]; },
        [&](double prefix, double total) { return prefix > v * total; });
    return int64_t{tile} * kTile + p.at;
  }

  // Sum of exp((z - max) / T) over all tokens but one, never as a difference; the logit of that
  // one.
  RF_DEVICE double mass_beside(int64_t token, float* z, const SharedTile& shared) const {
    const int own = static_cast<int>(token / kTile), at = static_cast<int>(token % kTile);
    double others = 0.0;
    for (int i = threadIdx.x % 32; i < count; i += 32) others += i == own ? 0.0 : mass(i);
    row.fill(own, shared);
    *z = static_cast<float>(shared[at]);
    __syncwarp();
    const double beside = shared.weigh({max, inverse}, at);
    return warp_sum(others) + beside;
  }
};

}  // namespace randfuse::cuda
