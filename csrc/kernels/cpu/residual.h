// Draws from max(w p - q, 0), normalised: what is left of p once q has been tried. Included like
// simd.h, after row_draws.h.
//
// Bytes: the stop row pair a second time, from the cache that its statistics left it in.
// Arithmetic: two exponentials a token. Float32 sums of a tile are off by at most kSumError of the
// mass of either law; where that leaves the coin open (a few in a thousand) everything is taken
// again in float64, so the token is the one that float64 gives.

// exp((z - max) / T) / total, a vector at a time.
struct Scaled {
  F32 max, slope, factor;

  Scaled(float m, double inverse, double times)
      : max(broadcast(m)),
        slope(broadcast(static_cast<float>(1.4426950408889634 * inverse))),
        factor(broadcast(static_cast<float>(times))) {}
  F32 operator()(const float* z) const {  // 0 for NaN
    const F32 number = larger(load(z), broadcast(-INFINITY));
    return mul(factor, exp2(mul(sub(number, max), slope)));
  }
};

template <class T>
struct Residual {
  using Z = cpu::Wide<T>;
  RowDraws<T>&p, &q;  // finite
  double w;
  double* mass;  // (tiles,)
  bool exact;
  double total = 0.0;

  Residual(RowDraws<T>& p_, RowDraws<T>& q_, double w_, double* mass_, bool exact_)
      : p(p_), q(q_), w(w_), mass(mass_), exact(exact_ || std::is_same_v<Z, double>) {
    sum();
  }

  // The token, or -1 if nothing is left of p.
  int64_t draw(const Words& words) {
    for (;; refine()) {
      if (exact && total == 0.0) return -1;
      const double slack = exact ? 0.0 : error(1.0 + w), u = coin53(words.r[0], words.r[1]);
      const int t = total > 0.0 ? tile_at(mass, p.reader.tiles(), u, slack) : -1;
      if (t < 0) continue;
      const Tile<Z> tile = p.read(t);
      const double both = weights(tile, q.read(t));
      const int c = token_at(p.scratch.weights, tile.n, coin53(words.r[2], words.r[3]),
                             exact ? 0.0 : error(both));
      if (c >= 0) return tile.first + c;
    }
  }

 private:
  static double error(double both) { return 2.0 * kSumError * both; }

  void sum() {
    total = 0.0;
    for (int t = 0; t < p.reader.tiles(); ++t) {
      const Tile<Z> a = p.read(t), b = q.read(t);
      if (exact) {
        weights(a, b);
        mass[t] = sum_of(p.scratch.weights, a.n);
      } else if constexpr (std::is_same_v<Z, float>) {
        mass[t] = quick_sum(a, b);
      }
      total += mass[t];
    }
  }

  void refine() {
    p.make_exact();
    q.make_exact();
    exact = true;
    sum();
  }

  double quick_sum(const Tile<float>& a, const Tile<float>& b) const {
    constexpr int kAccumulators = 4;
    const Scaled of_p(p.max, p.inverse, w / p.total), of_q(q.max, q.inverse, 1.0 / q.total);
    F32 sums[kAccumulators];
    for (F32& s : sums) s = broadcast(0.0f);
    for (int c = 0; c < a.n; c += kAccumulators * kF32) {
#pragma GCC unroll 4
      for (int k = 0; k < kAccumulators; ++k) {
        const F32 left = sub(of_p(a.z + c + k * kF32), of_q(b.z + c + k * kF32));
        sums[k] = add(sums[k], larger(left, broadcast(0.0f)));
      }
    }
    return sum_of_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }

  // Into p's scratch, in float64; returns the mass of w p and q together.
  double weights(const Tile<Z>& a, const Tile<Z>& b) {
    double* left = p.scratch.weights;
    double* right = q.scratch.weights;
    tile_weights(a, p.max, p.inverse, left);
    tile_weights(b, q.max, q.inverse, right);
    const double of_p = w / p.total, of_q = 1.0 / q.total;
    const double both = of_p * sum_of(left, a.n) + of_q * sum_of(right, a.n);
    for (int c = 0; c < a.n; ++c) {
      const double r = of_p * left[c] - of_q * right[c];
      left[c] = r > 0.0 ? r : 0.0;
    }
    return both;
  }
};
