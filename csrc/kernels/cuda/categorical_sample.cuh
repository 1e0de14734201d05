// cdf     2 launches. tile_stats: a warp a tile of 1024 tokens, so few rows still fill the device;
//         bytes: the logits once and 32 bytes a tile. draw: a warp a row and draw reads the row's
//         statistics (1.6 % of bf16 logits) and one tile again (from L2): an estimated 2 us of
//         latency, and 25 float64 operations a token of that tile. No atomics and nothing to
//         re-arm: the order of blocks is no input.
// race    2 launches. tile_race: a warp a tile; a quarter of a Philox block and 10 instructions a
//         token (34 where bytes allow 12: bound by arithmetic). draw takes the best of the tiles.
// filters 2 launches more: find_cuts, a block a row, and the statistics of the tiles that are left.
#pragma once
#include "categorical_sample.h"
#include "filters.cuh"
#include "tile_race.cuh"

namespace randfuse::cuda {

inline constexpr size_t kWarpMemory = SharedTile::kSize * sizeof(double);
inline constexpr size_t kDrawShared = kWarps * kWarpMemory + kMaxTiles * sizeof(double);
inline constexpr size_t kCutShared = kWarps * kWarpMemory + kBins * sizeof(Bin);

template <class T>
struct Workspace {
  TileStats<float>* stats;  // (count, tiles)
  Cut<float>* cuts;         // (count,)
  Racer* racers;            // (count, num_samples, tiles)

  RF_HD Workspace(const CategoricalArgs<T>& a, void* memory) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
    const size_t tiles = a.count * a.logits.tiles();
    const size_t cuts_at = a.measures() ? tiles * sizeof *stats : 0;
    const size_t racers_at = cuts_at + (a.filters ? a.count * sizeof *cuts : 0);
    stats = reinterpret_cast<TileStats<float>*>(begin);
    cuts = reinterpret_cast<Cut<float>*>(begin + cuts_at);
    racers = reinterpret_cast<Racer*>(begin + racers_at);
    bytes = racers_at + (a.race ? tiles * a.num_samples * sizeof *racers : 0);
  }
  size_t bytes;
};

// What all kernels know of an output row.
template <class T>
struct OutputRow : RaceRow {
  int64_t row;  // of the logits
  bool valid;

  RF_DEVICE OutputRow(const CategoricalArgs<T>& a, int64_t out) {
    row = a.chosen ? load_constant(a.chosen + out) : out;
    valid = 0 <= row && row < a.logits.rows;
    if (!valid) row = 0;
    const double t = a.temperature.at(row);
    greedy = !(t > 0.0);
    temperature = greedy ? 1.0 : fmin(fmax(t, 0x1p-100), 0x1p100);
    const int64_t group = row < a.rows_per_key ? 0 : row / a.rows_per_key;
    key = static_cast<uint64_t>(load_constant(a.keys + group));
    stream_row = static_cast<uint32_t>(a.row_offset + row - group * a.rows_per_key);
  }
};

// Before the cuts are known, or (kAgain) of what they leave.
template <class T, bool kFacts, bool kAgain>
__global__ void __launch_bounds__(kThreads, 2)
    tile_stats_kernel(const CategoricalArgs<T> a, const Workspace<T> w) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int tiles = a.logits.tiles();
  if (unit >= a.count * tiles) return;
  const int64_t out = unit / tiles;
  const int tile = static_cast<int>(unit - out * tiles);
  const OutputRow<T> row(a, out);
  if (!row.valid) return;
  const Cut<float> cut = kAgain ? w.cuts[out] : no_cut();
  TileStats<float> stats{-INFINITY, -INFINITY, 0.0, 0.0, false};
  bool had_nan = false;
  if (kAgain) {
    if (!(cut.value > -INFINITY)) return;
    had_nan = w.stats[unit].has_nan;
  }
  if (!kAgain || w.stats[unit].max >= cut.value) {
    WarpTile<T, 8> logits(a.logits, row.row, tile, cut);
    stats = tile_stats<kFacts>(logits, 1.0 / row.temperature);
  }
  stats.has_nan = stats.has_nan || had_nan;
  __syncwarp();
  if (threadIdx.x % 32 == 0) w.stats[unit] = stats;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    find_cuts_kernel(const CategoricalArgs<T> a, const Workspace<T> w) {
  RF_SHARED(double, memory, 0, kWarps* SharedTile::kSize);
  RF_SHARED(Bin, bins, kWarps * kWarpMemory, kBins);
  const int64_t out = blockIdx.x;
  const OutputRow<T> row(a, out);
  const int tiles = a.logits.tiles();
  const TileStats<float>* const stats = w.stats + out * tiles;
  const RowDraws<CutRow<T>> draws({a.logits, row.row, no_cut()}, stats, row.temperature);
  const Cut<float> cut =
      !row.valid ? no_cut()
                 : find_cut(draws, a.top_k.at(row.row), a.top_p.at(row.row), a.min_p.at(row.row),
                            bins, memory + threadIdx.x / 32 * SharedTile::kSize);
  if (threadIdx.x == 0) w.cuts[out] = cut;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    tile_race_kernel(const CategoricalArgs<T> a, const Workspace<T> w) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int tiles = a.logits.tiles();
  if (unit >= a.count * tiles) return;
  const int64_t out = unit / tiles;
  const int tile = static_cast<int>(unit - out * tiles);
  const OutputRow<T> row(a, out);
  if (!row.valid) return;
  const Cut<float> cut = a.filters ? w.cuts[out] : no_cut();
  const int64_t first = int64_t{tile} * kTile;
  const bool empty = a.filters && w.stats[unit].max == -INFINITY;
  WarpTile<T, 4> logits(a.logits, row.row, tile, cut);
  const TileRace<T> race(logits, row, static_cast<uint32_t>((a.logits.col_offset + first) / 4));
  for (int64_t s = 0; s < a.num_samples; ++s) {
    const Racer best = empty ? Racer{-INFINITY, 0} : race.run(static_cast<uint32_t>(s), first);
    if (threadIdx.x % 32 == 0) w.racers[(out * a.num_samples + s) * tiles + tile] = best;
  }
}

// What decoding rules rank positions by; the formulas are those of RowFacts and TokenFacts in
// kernels/cpu/row_draws.h.
template <class T>
RF_DEVICE void write_facts(const CategoricalArgs<T>& a, const RowDraws<CutRow<T>>& draws,
                           const SharedTile& shared, bool valid, int64_t unit, int64_t token) {
  float z;
  const float nan = NAN;
  float margin = nan, entropy = nan, logprob = nan, log_odds = nan, lse = draws.max;
  if (!valid || !draws.finite()) {
    if (valid && draws.max > 0.0f)
      margin = INFINITY, entropy = 0.0f, logprob = 0.0f, log_odds = INFINITY;
  } else {
    const int64_t best = draws.first_maximum();
    const double rest = draws.mass_beside(best, &z, shared), total = 1.0 + rest;
    double second = 0.0, dot = 0.0;
    for (int t = threadIdx.x % 32; t < a.logits.tiles(); t += 32) {
      const TileStats<float> tile = draws.tiles[t];
      if (tile.sum == 0.0) continue;
      const double x = (double{tile.max} - double{draws.max}) * draws.inverse, scale = exp64(x);
      second = fmax(second,
                    weight64(best / kTile == t ? tile.second : tile.max, draws.max, draws.inverse));
      if (scale > 0.0) dot += scale * (tile.dot + x * tile.sum);
    }
    second = -warp_min(-second);
    dot = warp_sum(dot);
    const double log_total = log1p(rest);
    lse = static_cast<float>(double{draws.max} / draws.temperature + log_total);
    margin = static_cast<float>(log((total + 1.0 - second) / (rest + second)));
    entropy = static_cast<float>(log_total - dot / total);
    const double beside = draws.mass_beside(token, &z, shared);
    const double x = (double{z} - double{draws.max}) * draws.inverse;
    logprob = static_cast<float>(x - log_total);
    log_odds = static_cast<float>(x - log(beside));
  }
  if (threadIdx.x % 32 != 0) return;
  a.logprob[unit] = logprob;
  a.log_odds[unit] = log_odds;
  if (unit % a.num_samples != 0) return;
  const int64_t out = unit / a.num_samples;
  a.margin[out] = margin;
  a.entropy[out] = entropy;
  a.logsumexp[out] = !valid || draws.has_nan ? nan : lse;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    draw_kernel(const CategoricalArgs<T> a, const Workspace<T> w) {
  RF_SHARED(double, memory, 0, kWarps* SharedTile::kSize);
  RF_SHARED(double, sums, kWarps* kWarpMemory, kMaxTiles);
  const int warp = threadIdx.x / 32, tiles = a.logits.tiles();
  const int64_t first_unit = static_cast<int64_t>(blockIdx.x) * kWarps;
  const SharedTile shared(memory + warp * SharedTile::kSize);
  const auto row_of = [&](int64_t unit) { return OutputRow<T>(a, unit / a.num_samples); };
  const auto draws_of = [&](int64_t unit, const OutputRow<T>& row) {
    const int64_t out = unit / a.num_samples;
    const Cut<float> cut = a.filters ? w.cuts[out] : no_cut();
    const TileStats<float>* const stats = a.measures() ? w.stats + out * tiles : nullptr;
    return RowDraws<CutRow<T>>({a.logits, row.row, cut}, stats, row.temperature);
  };
  const auto words_of = [&](int64_t unit, const OutputRow<T>& row) {
    return block<kWordRounds>(row.key, row.stream_row, 0,
                              static_cast<uint32_t>(unit % a.num_samples), draw_domain());
  };
  // A warp a draw.
  const int64_t units = a.count * a.num_samples, unit = first_unit + warp;
  const OutputRow<T> row = row_of(min(unit, units - 1));
  const RowDraws<CutRow<T>> draws = draws_of(min(unit, units - 1), row);
  const bool by_mass = !a.race && unit < units && row.valid && !row.greedy && draws.finite();
  const Words words = words_of(unit, row);
  int tile = by_mass ? draws.tile_of(coin53(words.r[0], words.r[1])) : 0;

  // Where only float64 sums can decide, the whole block takes them. The flags lie where the sums
  // will: all have read them before the first sum is written.
  if (threadIdx.x % 32 == 0) sums[warp] = tile;
  __syncthreads();
  uint32_t undecided = 0;
  for (int i = 0; i < kWarps; ++i) undecided |= static_cast<uint32_t>(sums[i] < 0.0) << i;
  for (int i = 0; i < kWarps; ++i) {
    if (!(undecided >> i & 1)) continue;
    __syncthreads();
    const RowDraws<CutRow<T>> other = draws_of(first_unit + i, row_of(first_unit + i));
    for (int t = warp; t < tiles; t += kWarps) {
      const double sum = other.exact_sum(t);
      if (threadIdx.x % 32 == 0) sums[t] = sum;
    }
    __syncthreads();
    if (warp == i) tile = draws.tile_of(coin53(words.r[0], words.r[1]), sums);
  }
  if (unit >= units) return;

  Racer winner{0.0, -1};
  if (row.valid && a.race) {
    winner = best_of_tiles(w.racers + unit * tiles, tiles);
  } else if (by_mass) {
    winner.token = draws.token_in(tile, coin53(words.r[2], words.r[3]), shared);
  } else if (row.valid) {
    winner.token = draws.first_maximum();
  }
  if (threadIdx.x % 32 == 0) {
    a.tokens[unit] = row.valid ? a.logits.col_offset + winner.token : -1;
    if (a.score) a.score[unit] = row.valid ? winner.score : NAN;
  }
  if (a.margin) write_facts(a, draws, shared, row.valid, unit, winner.token);
}

}  // namespace randfuse::cuda
