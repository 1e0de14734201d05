// Statistics of one tile, and weights in float64 for the draw inside it. Included like simd.h.
//
// Arithmetic per token: a maximum, then subtraction, product, clamp, five fma, a scale and an
// addition: 13 instructions for 16 tokens, 0.1 ns a token on an AVX-512 core.

// Weights of a tile relative to `max`, which may be the tile's or the row's; those of NaN are 0.
template <class Z>
inline void tile_weights(const Tile<Z>& tile, Z max, double inverse, double* weights) {
  for (int c = 0; c < tile.n; ++c) weights[c] = weight64(tile.z[c], max, inverse);
}

inline double sum_of(const double* w, int n) {
  double lanes[8] = {};
  for (int c = 0; c < n; c += 8)
    for (int l = 0; l < 8; ++l) lanes[l] += w[c + l];
  for (int width = 4; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

// The sums in float64, where float32 met a NaN, or a coin the edge of a tile.
template <bool kDot, class Z>
inline void exact_sums(const Tile<Z>& tile, double inverse, double* weights, TileStats<Z>* stats) {
  for (int c = 0; c < tile.n; ++c) stats->has_nan |= tile.z[c] != tile.z[c];
  if (stats->max - stats->max != 0) return;
  tile_weights(tile, stats->max, inverse, weights);
  stats->sum = sum_of(weights, tile.n);
  if (!kDot) return;
  for (int c = 0; c < tile.n; ++c) {
    const double x = (static_cast<double>(tile.z[c]) - static_cast<double>(stats->max)) * inverse;
    weights[c] = weights[c] > 0.0 ? weights[c] * x : 0.0;
  }
  stats->dot = sum_of(weights, tile.n);
}

template <class Z>
inline void merge_top_two(Z z, TileStats<Z>* s) {
  if (z > s->max) {
    s->second = s->max;
    s->max = z;
  } else if (z > s->second) {
    s->second = z;
  }
}

template <bool kDot>
inline TileStats<float> tile_stats(const Tile<float>& tile, double inverse, double* weights) {
  constexpr int kAccumulators = 4;
  static_assert(kPad % (kAccumulators * kF32) == 0, "a padded tile is whole steps");
  TileStats<float> stats{-INFINITY, -INFINITY, 0.0, 0.0, false};
  F32 top[kAccumulators], second[kAccumulators];
  for (F32& v : top) v = broadcast(-INFINITY);
  for (F32& v : second) v = broadcast(-INFINITY);
  for (int c = 0; c < tile.n; c += kAccumulators * kF32) {
#pragma GCC unroll 4
    for (int a = 0; a < kAccumulators; ++a) {
      const F32 z = load(tile.z + c + a * kF32);
      if (kDot) second[a] = larger(smaller(top[a], z), second[a]);
      top[a] = larger(z, top[a]);
    }
  }
  if (kDot) {
    for (int a = 0; a < kAccumulators; ++a) {
      float lanes[2][kF32];
      store(lanes[0], top[a]);
      store(lanes[1], second[a]);
      for (const auto& half : lanes)
        for (const float z : half) merge_top_two(z, &stats);
    }
  } else {
    stats.max = max_of_lanes(larger(larger(top[0], top[1]), larger(top[2], top[3])));
  }

  const float slope = static_cast<float>(1.4426950408889634 * inverse);
  if (stats.max - stats.max == 0.0f) {
    const F32 max = broadcast(stats.max), scale = broadcast(slope);
    F32 sum[kAccumulators], dot[kAccumulators];
    for (F32& v : sum) v = broadcast(0.0f);
    for (F32& v : dot) v = broadcast(0.0f);
    for (int c = 0; c < tile.n; c += kAccumulators * kF32) {
#pragma GCC unroll 4
      for (int a = 0; a < kAccumulators; ++a) {
        tile.prefetch(c + a * kF32);
        const F32 x = mul(sub(load(tile.z + c + a * kF32), max), scale), e = exp2(x);
        sum[a] = add(sum[a], e);
        if (kDot) dot[a] = fma(e, larger(broadcast(-125.0f), x), dot[a]);
      }
    }
    stats.sum = sum_of_lanes(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
    if (kDot) {
      const float total = sum_of_lanes(add(add(dot[0], dot[1]), add(dot[2], dot[3])));
      stats.dot = 0.6931471805599453 * total;
    }
    if (stats.sum < INFINITY) return stats;
    stats.sum = stats.dot = 0.0;
  }
  exact_sums<kDot>(tile, inverse, weights, &stats);
  return stats;
}

template <bool kDot>
inline TileStats<double> tile_stats(const Tile<double>& tile, double inverse, double* weights) {
  TileStats<double> stats{-INFINITY, -INFINITY, 0.0, 0.0, false};
  for (int c = 0; c < tile.n; ++c) merge_top_two(tile.z[c], &stats);
  exact_sums<kDot>(tile, inverse, weights, &stats);
  return stats;
}

// The tile in which the running mass passes u times the whole; -1 where an edge is so near that
// sums off by `slack` might have it on the other side.
inline int tile_at(const double* mass, int tiles, double u, double slack) {
  double total = 0.0, before = 0.0, after = 0.0;
  for (int t = 0; t < tiles; ++t) total += mass[t];
  const double target = u * total;  // below total: coin53
  int t = 0;
  while ((after = before + mass[t]) <= target) before = after, ++t;
  return target - before >= slack && after - target >= slack ? t : -1;
}

// The same among the weights of a tile: chunks of kPad, then one token by token.
inline int token_at(const double* weights, int n, double u, double slack = 0.0) {
  double prefix[kTile / kPad];
  double total = 0.0;
  const int chunks = n / kPad;
  for (int k = 0; k < chunks; ++k) prefix[k] = total += sum_of(weights + k * kPad, kPad);
  const double target = u * total;  // below total: coin53
  int k = 0;
  while (prefix[k] <= target) ++k;
  double running = k == 0 ? 0.0 : prefix[k - 1], before = running;
  int found = 0;
  for (int c = k * kPad; c < (k + 1) * kPad; ++c) {
    if (weights[c] == 0.0) continue;
    found = c;  // the last one with a weight, should rounding leave the sum short of the target
    before = running;
    if ((running += weights[c]) > target) break;
  }
  const bool open = target - before < slack || running - target < slack;
  return slack > 0.0 && open ? -1 : found;
}
