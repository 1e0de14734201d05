// top_k, top_p and min_p without a sort: the last token that is kept, by radix select over the bits
// of the logits. Included like simd.h, after logit_tiles.h and tile_stats.h.
//
// Three histograms of 2048 bins (six for float64 logits) replace V log V comparisons; the second
// and third visit only tiles that reach into the bin where the budget ran out. A token costs one
// addition into a bin, and for top_p an exponential in float64.

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
    Key prefix = 0;
    double before = 0.0;
    for (int fixed = 0; fixed < kBits;) {
      const int digit = kBits - fixed < kDigit ? kBits - fixed : kDigit,
                shift = kBits - fixed - digit;
      const int bins = 1 << digit;
      for (int b = 0; b < bins; ++b) histogram[b] = 0.0;
      for_each_tile<kCount>(reader, prefix, fixed, [&](const Tile<Z>& tile) {
        for (int c = 0; c < tile.n; ++c) {
          const Key key = order_key(tile.z[c]);
          if (fixed > 0 && key >> (kBits - fixed) != prefix) continue;
          histogram[key >> shift & (bins - 1)] += kCount ? 1.0 : weights[c];
        }
        return true;
      });
      if (!kCount && fixed == 0) {
        double whole = 0.0;  // in the order of the search below, which therefore gets there
        for (int b = bins - 1; b >= 0; --b) whole += histogram[b];
        budget *= whole;
      }
      int found = 0;
      for (int b = bins - 1; b >= 0; --b) {
        if (histogram[b] == 0.0) continue;
        found = b;  // the last one with a weight, should rounding leave the sum short
        if (before + histogram[b] >= budget) break;
        if (b > 0) before += histogram[b];
      }
      prefix = static_cast<Key>(prefix << digit) | static_cast<Key>(found);
      fixed += digit;
    }
    Cut<Z> cut{0, kMaxVocab};
    from_order_key(prefix, &cut.value);
    for_each_tile<kCount>(reader, prefix, kBits, [&](const Tile<Z>& tile) {
      for (int c = 0; c < tile.n; ++c) {
        if (tile.z[c] != cut.value) continue;
        cut.last = tile.first + c;
        before += kCount ? 1.0 : weights[c];
        if (before >= budget) return false;
      }
      return true;
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
  // visit(tile) on tiles that hold keys with this prefix or above, until it returns false.
  template <bool kCount, class Reader, class Visit>
  void for_each_tile(const Reader& reader, Key prefix, int fixed, Visit&& visit) const {
    for (int t = 0; t < reader.tiles(); ++t) {
      if (fixed > 0 && order_key(tiles[t].max) >> (kBits - fixed) < prefix) continue;
      const Tile<Z> tile = reader.read(t, buffer);
      if (!kCount) tile_weights(tile, row_max, inverse, weights);
      if (!visit(tile)) return;
    }
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
