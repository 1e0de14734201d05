// One row: its statistics, and draws from them. What categorical_sample and speculative_accept are
// made of. Included like simd.h, after filters.h.

struct Coins {
  uint64_t key;
  uint32_t row;

  Words block(uint32_t domain, uint32_t j, uint32_t draw) const {
    return randfuse::block<kWordRounds>(key, row, j, draw, domain);
  }
};

struct RowFacts {
  double log_total;  // log of the sum of exp((z - max) / T)
  double logsumexp, margin, entropy;
};
struct TokenFacts {
  double logprob, log_odds;
};

template <class T>
struct RowDraws {
  using Z = cpu::Wide<T>;
  LogitReader<T> reader;
  double temperature, inverse;  // > 0; 1 / temperature
  cpu::RowScratch<Z>& scratch;
  Z max = 0;
  double total = 0.0;  // sum of exp((z - max) / T)
  bool has_nan = false, measured = false;
  bool exact = false;  // the total is that of float64, and so are the tiles' where there are any

  RowDraws(const cpu::LogitRows<T>& rows, int64_t row, double t, cpu::RowScratch<Z>& s)
      : reader(rows, row, t), temperature(t), inverse(1.0 / t), scratch(s) {}

  bool finite() const { return max - max == 0; }
  Tile<Z> read(int t) { return reader.read(t, scratch.buffer); }
  Z logit(int64_t token) { return read(static_cast<int>(token / kTile)).z[token % kTile]; }
  double probability(int64_t token) { return weight64(logit(token), max, inverse) / total; }

  using Law = cpu::RowLaw<Z>;
  Law law() const { return {max, total, reader.cut, exact}; }

  // Instead of measuring: what an earlier look at the row found out.
  void adopt(const Law& law) {
    max = law.max;
    total = law.total;
    reader.cut = law.cut;
    exact = law.exact;
  }
  // The same with log of the sum of exp(z / T); false if that is no number.
  bool adopt(double logsumexp) {
    max = static_cast<Z>(logsumexp * temperature);
    total = std::exp(logsumexp - static_cast<double>(max) * inverse);
    exact = true;
    return finite();
  }

  // The read of the logits; `known` are statistics of the uncut tiles that another thread took.
  template <bool kDot>
  void measure(const TileStats<Z>* known = nullptr) {
    max = static_cast<Z>(-INFINITY);
    for (int t = 0; t < reader.tiles(); ++t) {
      // A tile wholly below the cut needs no second look.
      if (measured && scratch.tiles[t].max < reader.cut.value) {
        scratch.tiles[t] = {static_cast<Z>(-INFINITY), static_cast<Z>(-INFINITY), 0.0, 0.0, false};
        continue;
      }
      scratch.tiles[t] = known ? known[t] : tile_stats<kDot>(read(t), inverse, scratch.weights);
      has_nan |= scratch.tiles[t].has_nan;
      max = scratch.tiles[t].max > max ? scratch.tiles[t].max : max;
    }
    measured = true;
    exact = std::is_same_v<Z, double>;
    weigh_tiles();
  }

  template <bool kDot>
  void tile_range(int begin, int end, TileStats<Z>* out) {
    for (int t = begin; t < end; ++t) out[t] = tile_stats<kDot>(read(t), inverse, scratch.weights);
  }

  // Sums in float64, where those in float32 leave a decision open.
  template <bool kDot = false>
  void make_exact() {
    if (exact) return;
    if (!measured) measure<kDot>();
    for (int t = 0; t < reader.tiles(); ++t)
      exact_sums<kDot>(read(t), inverse, scratch.weights, &scratch.tiles[t]);
    exact = true;
    weigh_tiles();
  }

  // A measured row goes on without `token`.
  void ban(int64_t token) {
    reader.banned = token;
    const int own = static_cast<int>(token / kTile);
    scratch.tiles[own] = tile_stats<false>(read(own), inverse, scratch.weights);
    max = static_cast<Z>(-INFINITY);
    for (int t = 0; t < reader.tiles(); ++t)
      max = scratch.tiles[t].max > max ? scratch.tiles[t].max : max;
    exact = std::is_same_v<Z, double>;
    weigh_tiles();
  }

  void cut(int64_t top_k, double top_p, double min_p) {
    const CutFinder<Z> finder{scratch.tiles,  max, inverse, scratch.histogram, scratch.buffer,
                              scratch.weights};
    reader.cut = find_cut(reader, finder, top_k, top_p, min_p);
  }

  int64_t first_maximum() {
    if (max == static_cast<Z>(-INFINITY)) return 0;
    for (int t = 0; t < reader.tiles(); ++t) {
      if (scratch.tiles[t].max != max) continue;
      const Tile<Z> tile = read(t);
      for (int c = 0; c < tile.n; ++c)
        if (tile.z[c] == max) return tile.first + c;
    }
    return 0;  // not reached: some tile has the maximum
  }

  // Inverse CDF: a tile by words 0 and 1, a token in it by words 2 and 3.
  int64_t by_mass(const Words& w) {
    const int t = tile_of(coin53(w.r[0], w.r[1]));
    const Tile<Z> tile = read(t);
    tile_weights(tile, scratch.tiles[t].max, inverse, scratch.weights);
    return tile.first + token_at(scratch.weights, tile.n, coin53(w.r[2], w.r[3]));
  }

  int tile_of(double u) {
    for (;;) {
      const int t = tile_at(scratch.mass, reader.tiles(), u, exact ? 0.0 : kSumError * total);
      if (t >= 0) return t;
      make_exact();
    }
  }

  // argmax of z / T - log E, the lowest index among equals, into the racers; all draws in one read.
  void race(const Coins& coins, int64_t draws) { race(coins, draws, 0, reader.tiles()); }

  // The same over tiles [begin, end).
  void race(const Coins& coins, int64_t draws, int begin, int end) {
    for (int64_t s = 0; s < draws; ++s) scratch.racers[s] = {-INFINITY, 0};
    for (int t = begin; t < end; ++t) {
      const Tile<Z> tile = read(t);
      for (int64_t s = 0; s < draws; ++s)
        race_tile(tile, coins, static_cast<uint32_t>(s), &scratch.racers[s]);
    }
  }

  RowFacts facts() {
    const double nan = NAN, lse_flag = has_nan ? nan : static_cast<double>(max);
    if (!finite()) {
      const bool point = max > 0;  // +inf: all mass on the first of them
      return {0.0, lse_flag, point ? INFINITY : nan, point ? 0.0 : nan};
    }
    const int64_t best = first_maximum();
    const double rest = mass_beside(best);
    double second = 0.0, dot = 0.0;
    for (int t = 0; t < reader.tiles(); ++t) {
      const TileStats<Z>& tile = scratch.tiles[t];
      if (tile.sum == 0.0) continue;
      const double x = (static_cast<double>(tile.max) - static_cast<double>(max)) * inverse;
      const Z runner_up = best / kTile == t ? tile.second : tile.max;
      const double w = weight64(runner_up, max, inverse), scale = exp64(x);
      second = w > second ? w : second;
      if (scale > 0.0) dot += scale * (tile.dot + x * tile.sum);
    }
    const double total = 1.0 + rest;
    RowFacts f;
    f.log_total = std::log1p(rest);
    f.logsumexp = has_nan ? nan : static_cast<double>(max) / temperature + f.log_total;
    f.margin = std::log((total + 1.0 - second) / (rest + second));
    f.entropy = f.log_total - dot / total;
    return f;
  }

  TokenFacts facts_of(int64_t token, const RowFacts& row) {
    if (!finite()) return max > 0 ? TokenFacts{0.0, INFINITY} : TokenFacts{NAN, NAN};
    const Tile<Z> tile = read(static_cast<int>(token / kTile));
    const double x =
        (static_cast<double>(tile.z[token % kTile]) - static_cast<double>(max)) * inverse;
    return {x - row.log_total, x - std::log(mass_beside(token))};
  }

 private:
  void weigh_tiles() {
    total = 0.0;
    for (int t = 0; t < reader.tiles(); ++t)
      total += scratch.mass[t] = tile_mass(scratch.tiles[t], max, inverse);
  }

  // Sum of exp((z - max) / T) over all tokens but one, never as a difference.
  double mass_beside(int64_t token) {
    const int own = static_cast<int>(token / kTile);
    double others = 0.0;
    for (int t = 0; t < reader.tiles(); ++t) others += t == own ? 0.0 : scratch.mass[t];
    const Tile<Z> tile = read(own);
    tile_weights(tile, max, inverse, scratch.weights);
    scratch.weights[token % kTile] = 0.0;
    return others + sum_of(scratch.weights, tile.n);
  }

  void race_tile(const Tile<Z>& tile, const Coins& coins, uint32_t draw, cpu::Racer* best) const {
    // E >= v >= w 2^-24, w the upper 24 bits, and log2(w) >= (bits of the float w) 2^-23 - 127, so
    //   z / T - log E <= z / T + (151 - bits 2^-23) ln 2.
    // Rounding is at most 2^-21 (|bound| + 220); a token within that of the best score is scored.
    const Row row = row_of(coins.key, coins.row, draw, race_high_domain());
    const F32 per_bit = broadcast(static_cast<float>(-0.6931471805599453 * 0x1p-23));
    const F32 at_zero = broadcast(static_cast<float>(0.6931471805599453 * 151.0));
    const F32 slope = broadcast(static_cast<float>(inverse));
    F32 reach = broadcast(bound_below(best->score));
    for (int c = 0; c < tile.n; c += 32) {
      uint32_t words[32];
      words32(row, block_of(tile.first + c), words);
      for (int v = 0; v < 32; v += kF32) {
        const F32 bits = bits_as_number(upper24(words + v));
        const F32 z = narrow(tile.z + c + v);
        const F32 bound = fma(bits, per_bit, fma(z, slope, at_zero));
        for (uint32_t left = not_less(bound, reach); left != 0; left &= left - 1) {
          const int l = v + __builtin_ctz(left);
          if (score(tile.z[c + l], tile.first + c + l, words[l], coins, draw, best))
            reach = broadcast(bound_below(best->score));
        }
      }
    }
  }

  uint32_t block_of(int64_t token) const {
    return static_cast<uint32_t>((reader.rows.col_offset + token) / 4);
  }

  static float bound_below(double score) {
    return static_cast<float>(score - 0x1p-20 * (std::fabs(score) + 220.0));
  }

  static F32 narrow(const float* z) { return load(z); }
  static F32 narrow(const double* z) {  // one more rounding, within the slack
    float lanes[kF32];
    for (int l = 0; l < kF32; ++l) lanes[l] = static_cast<float>(z[l]);
    return load(lanes);
  }

  bool score(Z z, int64_t token, uint32_t high, const Coins& coins, uint32_t draw,
             cpu::Racer* best) const {
    if (!(z > static_cast<Z>(-INFINITY))) return false;
    const Words low = coins.block(race_low_domain(), block_of(token), draw);
    const double s =
        static_cast<double>(z) / temperature - log64(race_exponential(high, low.r[token % 4]));
    if (!(s > best->score)) return false;
    *best = {s, token};
    return true;
  }
};
