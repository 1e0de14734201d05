// top_k, top_p and min_p without a sort: the last token that is kept, by radix select over the bits
// of the logits; the rule is that of kernels/cpu/filters.h. A block works on one row.
//
// Three histograms of at most 2048 bins and a search for ties. Bins hold integers, counts or
// weights at 2^-61 of the row's, so that they do not depend on the order of the atomics. The first
// histogram reads the row again (from L2 where it fits), the others only tiles that reach into the
// bin where the budget ran out.
//
// So fewer rows than multiprocessors leave the others idle: at V = 151936 one takes an estimated 8
// us to read a row of bf16. Blocks that shared a row would need its histograms in global memory and
// a launch for each digit of each filter, seven in all; which is quicker has not been measured.
#pragma once
#include "row_stats.cuh"

namespace randfuse::cuda {

inline constexpr int kDigit = 11, kBins = 1 << kDigit;
using Bin = unsigned long long;

template <class T>
struct CutFinder {
  const LogitRows<T>& rows;
  int64_t row;
  const TileStats<float>* tiles;  // of the uncut row
  RowWeight weight;               // relative to the row's maximum
  double units;                   // weights are counted in 1 / units
  Bin* bins;                      // (kBins,), shared by the block
  double* memory;                 // a SharedTile of the warp's own
  Cut<float> cut;

  // In the order of Cut, counts (top_k) or weights (top_p) added up: the first token at which the
  // sum reaches `budget`, a number of tokens or a fraction of the row's weight.
  template <bool kCount>
  RF_DEVICE void reach(double budget) {
    uint32_t prefix = 0;
    double before = 0.0;
    for (int fixed = 0; fixed < 32; fixed += kDigit) {
      const int digit = min(kDigit, 32 - fixed), shift = 32 - fixed - digit, count = 1 << digit;
      for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
      __syncthreads();
      for_each_tile(prefix, fixed, [&](int tile) {
        WarpTile<T, 4> logits(rows, row, tile, cut);
#pragma unroll 1
        for (int i = 0; i < kPerLane; i += 4, rotate<4>(logits.z)) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const uint32_t key = order_key(logits.z[k]);
            if (fixed > 0 && key >> (32 - fixed) != prefix) continue;
            const Bin amount = kCount ? 1 : amount_of(logits.z[k]);
            if (amount != 0) atomicAdd(bins + (key >> shift & (count - 1)), amount);
          }
        }
      });
      __syncthreads();
      // Each warp finds the same place: from the upper end, the bin in which the budget runs out.
      const Place p = first_place(
          count, [&](int b) { return static_cast<double>(bins[count - 1 - b]); },
          [&](double sum, double whole) {
            return before + sum >= (!kCount && fixed == 0 ? budget * whole : budget);
          });
      if (!kCount && fixed == 0) budget *= p.total;
      before += p.before;
      prefix = prefix << digit | static_cast<uint32_t>(count - 1 - p.at);
      __syncthreads();
    }
    float value;
    from_order_key(prefix, &value);
    const double each = kCount ? 1.0 : static_cast<double>(amount_of(value));
    // NaN, the last of all, and -inf cut nothing.
    if (value > -INFINITY) take({value, last_of(value, (budget - before) / each)});
    __syncthreads();
  }

  // The smallest logit z with (z - max) / T >= ln(min_p), found in the order of the keys.
  RF_DEVICE void at_least(double min_p) {
    const double bound = log64(min_p);
    uint32_t low = order_key(-INFINITY), high = order_key(weight.max);
    float z;
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      from_order_key(middle, &z);
      if ((double{z} - double{weight.max}) * weight.inverse >= bound) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    from_order_key(low, &z);
    take({z, kMaxVocab});
  }

 private:
  RF_DEVICE void take(const Cut<float>& other) {
    if (other.stricter_than(cut)) cut = other;
  }

  RF_DEVICE Bin amount_of(float z) const { return static_cast<Bin>(weight(z) * units + 0.5); }

  // The warps share the tiles that hold keys with this prefix or above.
  template <class Visit>
  RF_DEVICE void for_each_tile(uint32_t prefix, int fixed, const Visit& visit) const {
    for (int tile = threadIdx.x / 32; tile < rows.tiles(); tile += kWarps) {
      if (fixed > 0 && order_key(tiles[tile].max) >> (32 - fixed) < prefix) continue;
      visit(tile);
    }
  }

  // Of the tokens equal to `value`, the one with which there are `wanted` of them, by index.
  RF_DEVICE int64_t last_of(float value, double wanted) {
    for (int b = threadIdx.x; b < rows.tiles(); b += kThreads) bins[b] = 0;
    __syncthreads();
    for_each_tile(order_key(value), 0, [&](int tile) {
      const WarpTile<T, 4> logits(rows, row, tile, cut);
      int equal = 0;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) equal += logits.z[k] == value;
      equal = warp_sum(equal);
      if (threadIdx.x % 32 == 0) bins[tile] = static_cast<Bin>(equal);
    });
    __syncthreads();
    const Place p = first_place(
        rows.tiles(), [&](int t) { return static_cast<double>(bins[t]); },
        [&](double sum, double) { return sum >= wanted; });
    const SharedTile shared(memory);
    shared.fill(WarpTile<T, 4>(rows, row, p.at, cut));
    const Place in = first_place(
        kTile, [&](int t) { return shared[t] == double{value} ? 1.0 : 0.0; },
        [&](double sum, double) { return p.before + sum >= wanted; });
    return int64_t{p.at} * kTile + in.at;
  }
};

// The cut of top_k, top_p and min_p together, found by a block; what lies outside their ranges is
// clamped.
template <class T>
RF_DEVICE Cut<float> find_cut(const RowDraws<CutRow<T>>& draws, int64_t top_k, double top_p,
                              double min_p, Bin* bins, double* memory) {
  const LogitRows<T>& rows = draws.row.rows;
  CutFinder<T> finder{rows, draws.row.row, draws.tiles, {draws.max, draws.inverse},
                      1.0,  bins,          memory,      no_cut()};
  if (!draws.finite()) return finder.cut;
  // 2^61 over the power of two below the row's weight, which is known to 2^-18.
  const int64_t exponent = to_bits(draws.total_mass()) >> 52;
  finder.units = from_bits((int64_t{1023 + 61 + 1023} - exponent) << 52);
  if (top_k < rows.vocab) finder.template reach<true>(static_cast<double>(top_k > 1 ? top_k : 1));
  if (top_p < 1.0) finder.template reach<false>(fmax(top_p, 0.0));
  if (min_p > 0.0) finder.at_least(fmin(min_p, 1.0));
  return finder.cut;
}

}  // namespace randfuse::cuda
