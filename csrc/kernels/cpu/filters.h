// top_k, top_p and min_p without a sort: the last token that is kept, by radix select over the bits
// of the logits. Included like simd.h, after logit_tiles.h and tile_stats.h.
//
// Three histograms of 2048 bins (six for float64 logits) replace V log V comparisons. Before the
// first a logit is known that the last token cannot be below: for top_k one that k tokens reach,
// for top_p one so unlikely that V tokens like it would not be missed. So vectors are compared with
// it, and only what passes, some hundred tokens of a row, costs an addition into a bin. top_p takes
// the row's weight in float64 first, an exponential a token.

constexpr int kDigit = 11;

template <class Z>
struct CutFinder {
  using Key = decltype(order_key(Z{}));
  static constexpr int kBits = 8 * sizeof(Key);
  const TileStats<Z>* tiles;  // of the uncut row: which tiles can be skipped
  Z row_max;
  double inverse;     // 1 / T
  double* histogram;  // (2^kDigit,)
  Z* buffer;          // (kTile,)
  double* weights;    // (kTile,)

  // In the order of Cut, counts (top_k) or weights (top_p) added up: the first token at which the
  // sum reaches `budget`, a number of tokens or a fraction of the row's weight.
  template <bool kCount, class Reader>
  Cut<Z> reach(const Reader& reader, double budget) const {
    Range range{kCount ? reached_by(reader, budget) : weighty(reader, budget),
                static_cast<Z>(INFINITY)};
    Key prefix = 0;
    double before = 0.0, whole = 0.0;
    for (int fixed = 0; fixed < kBits;) {
      const int digit = kBits - fixed < kDigit ? kBits - fixed : kDigit,
                shift = kBits - fixed - digit;
      const int bins = 1 << digit;
      for (int b = 0; b < bins; ++b) histogram[b] = 0.0;
      const bool weigh = !kCount && fixed == 0;
      for_each_tile(reader, weigh ? reader.cut.value : range.least, [&](const Tile<Z>& tile) {
        if (weigh) {
          tile_weights(tile, row_max, inverse, weights);
          whole += sum_of(weights, tile.n);
        }
        return for_each_token(tile, range, [&](int c) {
          const Key key = order_key(tile.z[c]);
          histogram[key >> shift & (bins - 1)] += weigh ? weights[c] : worth<kCount>(tile.z[c]);
          return true;
        });
      });
      if (weigh) budget *= whole;
      int found = 0;
      for (int b = bins - 1; b >= 0; --b) {
        if (histogram[b] == 0.0) continue;
        found = b;  // the last one with a weight, should rounding leave the sum short
        if (before + histogram[b] >= budget) break;
        if (b > 0) before += histogram[b];
      }
      prefix = static_cast<Key>(prefix << digit) | static_cast<Key>(found);
      from_order_key(static_cast<Key>(prefix << shift), &range.least);
      from_order_key(static_cast<Key>((prefix + 1) << shift), &range.above);
      fixed += digit;
    }
    Cut<Z> cut{range.least, kMaxVocab};
    for_each_tile(reader, range.least, [&](const Tile<Z>& tile) {
      return for_each_token(tile, range, [&](int c) {
        cut.last = tile.first + c;
        before += worth<kCount>(tile.z[c]);
        return before < budget;
      });
    });
    return cut;
  }

  // The smallest logit z with (z - max) / T >= ln(min_p), found in the order of the keys.
  Cut<Z> at_least(double min_p) const {
    const double bound = min_p > 0.0 ? log64(min_p) : -INFINITY;
    Key low = order_key(static_cast<Z>(-INFINITY)), high = order_key(row_max);
    while (low < high) {
      const Key middle = low + (high - low) / 2;
      Z z;
      from_order_key(middle, &z);
      if ((static_cast<double>(z) - static_cast<double>(row_max)) * inverse >= bound) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    Cut<Z> cut{0, kMaxVocab};
    from_order_key(low, &cut.value);
    return cut;
  }

 private:
  // A logit that `count` tokens reach, if the largest ones in the lanes of the tiles are as many.
  template <class Reader>
  Z reached_by(const Reader& reader, double count) const {
    constexpr int kLanes = 64;
    for (int b = 0; b < 1 << kDigit; ++b) histogram[b] = 0.0;
    for_each_tile(reader, static_cast<Z>(-INFINITY), [&](const Tile<Z>& tile) {
      Z top[kLanes];
      for (Z& z : top) z = static_cast<Z>(-INFINITY);
      for (int c = 0; c < tile.n; c += kLanes)
        for (int l = 0; l < kLanes; ++l) top[l] = tile.z[c + l] > top[l] ? tile.z[c + l] : top[l];
      for (const Z z : top) histogram[order_key(z) >> (kBits - kDigit)] += 1.0;
      return true;
    });
    Z least = static_cast<Z>(-INFINITY);
    for (Key b = (1 << kDigit) - 1; b > 0; --b) {
      if ((count -= histogram[b]) > 0.0) continue;
      from_order_key(static_cast<Key>(b << (kBits - kDigit)), &least);
      break;
    }
    return least;
  }

  // A logit so small that all tokens below it have half of what top_p may leave out; the budget
  // is then reached above it whatever rounding does. What an earlier filter left needs none.
  template <class Reader>
  Z weighty(const Reader& reader, double top_p) const {
    double total = 0.0;
    for (int t = 0; t < reader.tiles(); ++t) total += tile_mass(tiles[t], row_max, inverse);
    const double share = 0.5 * (1.0 - top_p) * total / static_cast<double>(reader.rows.vocab);
    const bool cut = reader.cut.value > static_cast<Z>(-INFINITY);
    if (cut || 1.0 - top_p < 0x1p-30) return reader.cut.value;
    return static_cast<Z>(static_cast<double>(row_max) + log64(share) / inverse);
  }

  template <bool kCount>
  double worth(Z z) const {
    return kCount ? 1.0 : weight64(z, row_max, inverse);
  }

  // visit(tile) on tiles that reach `least`, until it returns false.
  template <class Reader, class Visit>
  void for_each_tile(const Reader& reader, Z least, Visit&& visit) const {
    for (int t = 0; t < reader.tiles(); ++t)
      if (!(tiles[t].max < least) && !visit(reader.read(t, buffer))) return;
  }

  // Logits of [least, above). A NaN for a bound, which stands at the lower end of the keys, is none
  // below and all above: nothing is there but NaN, which no filter needs to see.
  struct Range {
    Z least, above;
  };

  // visit(place) of all tokens in the range, until it returns false, as this then does.
  template <class Visit>
  static bool for_each_token(const Tile<Z>& tile, const Range& range, Visit&& visit) {
    for (int c = 0; c < tile.n; c += kF32) {
      uint32_t left = not_below(tile.z + c, range.least) & ~not_below(tile.z + c, range.above);
      for (; left != 0; left &= left - 1)
        if (!visit(c + __builtin_ctz(left))) return false;
    }
    return true;
  }

  static uint32_t not_below(const float* z, float least) {
    return not_less(load(z), broadcast(least));
  }
  static uint32_t not_below(const double* z, double least) {
    uint32_t mask = 0;
    for (int l = 0; l < kF32; ++l) mask |= static_cast<uint32_t>(!(z[l] < least)) << l;
    return mask;
  }
};

template <class Reader, class Z>
inline Cut<Z> find_cut(Reader reader, const CutFinder<Z>& finder, int64_t top_k, double top_p,
                       double min_p) {
  const auto take = [&](const Cut<Z>& cut) {  // NaN, the last of all, is no stricter
    if (cut.stricter_than(reader.cut)) reader.cut = cut;
  };
  if (top_k < reader.rows.vocab) take(finder.template reach<true>(reader, top_k));
  if (top_p < 1.0) take(finder.template reach<false>(reader, top_p));
  if (min_p > 0.0) take(finder.at_least(min_p));
  return reader.cut;
}
