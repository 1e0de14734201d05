// Draws from max(w p - q, 0), normalised: what is left of p once q has been tried. A block works on
// it.
//
// Bytes: the stop row pair a second time, mostly from L2: an estimated 7 us at V = 151936.
// Arithmetic: two ex2 a token. Float32 sums of a tile are off by at most kSumError of the mass of
// either law (ex2 as in tile_stats, a product more, 32 terms a lane and 5 steps); where that
// leaves the coin open (of flat laws over 150 tiles a few in a hundred draws, of peaked ones fewer)
// everything is taken again in float64, an estimated 150 us for one block at that V, so the token
// is the one that float64 gives.
#pragma once
#include "accept_team.cuh"

namespace randfuse::cuda {

inline constexpr int64_t kNothing = -1, kUndecided = -2;

struct Scaled {  // exp((z - max) / T) / total times a factor; 0 for NaN
  float max, slope, factor;
  RF_DEVICE float operator()(float z) const {
    return factor * exp2_approx((fmaxf(z, -INFINITY) - max) * slope);
  }
};

template <class T>
struct Residual {
  const AcceptTeam<T>& team;
  double w;
  bool exact;
  double total = -1.0;                                    // unknown
  const LawRow<T>&p = team.memory.p, &q = team.memory.q;  // finite

  RF_DEVICE void sum() {
    double* const mass = team.memory.residual;
    team.for_each_tile(p.count, [&](int t) {
      const double own = tile_sum(t);
      if (team.leads()) mass[t] = own;
    });
    total = 0.0;
#pragma unroll 1
    for (int t = threadIdx.x % 32; t < p.count; t += 32) total += mass[t];
    total = warp_sum(total);
  }

  // The token, kNothing if nothing is left of p, or kUndecided.
  RF_DEVICE int64_t draw(const Words& words) {
    const double* const mass = team.memory.residual;
    if (total < 0.0) sum();
    if (total == 0.0) return exact ? kNothing : kUndecided;
    return team.by_one_warp([&]() -> int64_t {
      const SharedTile left(team.memory.left);
      const Place tile = place(p.count, mass, coin53(words.r[0], words.r[1]), 1.0 + w);
      if (tile.at < 0) return kUndecided;
      const double both = weights(tile.at);
      const Place in = place(kTile, left, coin53(words.r[2], words.r[3]), both);
      return in.at < 0 ? kUndecided : int64_t{tile.at} * kTile + in.at;
    });
  }

 private:
  static constexpr int kAtOnce = AcceptRow<T>::kAtOnce;

  // Where the running sum of masses passes u times the whole; at -1 where it is too near an edge,
  // sums being off by what two laws of mass `both` may be.
  template <class Masses>
  RF_DEVICE Place place(int count, const Masses& masses, double u, double both) const {
    Place found = first_place(
        count, [&](int t) { return masses[t]; },
        [&](double prefix, double whole) { return prefix > u * whole; });
    const double target = u * found.total, slack = 2.0 * kSumError * both;
    if (!exact && (target - found.before < slack || found.after - target < slack)) found.at = -1;
    return found;
  }

  struct Pair {  // w p(v) and q(v)
    double p, q;
    RF_DEVICE double left() const { return p > q ? p - q : 0.0; }
  };
  RF_DEVICE Pair pair(float a, float b) const {
    return {product64(w / p.total, weight64(a, p.max, p.inverse)),
            product64(1.0 / q.total, weight64(b, q.max, q.inverse))};
  }

  // body(token, z of p, z of q) of a lane's tokens of a tile; as AcceptRow::for_each_logit.
  template <int kCopies, class Body>
  RF_DEVICE void for_each_pair(int t, const Body& body) const {
    const int64_t first = int64_t{t} * kTile, end = min(first + kTile, p.row.vocab);
#pragma unroll 1
    for (int64_t v = first + threadIdx.x % 32; v < end; v += 32 * kAtOnce) {
      float a[kAtOnce], b[kAtOnce];
      p.row.load(v, end, a);
      q.row.load(v, end, b);
#pragma unroll kCopies
      for (int k = 0; k < kAtOnce; ++k, rotate<1>(a), rotate<1>(b)) {
        const int64_t token = v + 32 * k;
        if (token < end) body(token, a[0], b[0]);
      }
    }
  }

  RF_DEVICE double tile_sum(int t) const {
    if (exact) {
      double sum = 0.0;
      for_each_pair<1>(t, [&](int64_t, float a, float b) { sum += pair(a, b).left(); });
      return warp_sum(sum);
    }
    const auto scaled = [](const LawRow<T>& law, double times) {
      return Scaled{law.max, static_cast<float>(1.4426950408889634 * law.inverse),
                    static_cast<float>(times / law.total)};
    };
    const Scaled of_p = scaled(p, w), of_q = scaled(q, 1.0);
    float sum = 0.0f;
    for_each_pair<kAtOnce>(
        t, [&](int64_t, float a, float b) { sum += fmaxf(of_p(a) - of_q(b), 0.0f); });
    return warp_sum(sum);
  }

  // Into the memory of one warp, in float64; returns the mass of w p and q together.
  RF_DEVICE double weights(int t) const {
    const SharedTile left(team.memory.left);
    double both = 0.0;
    __syncwarp();
    for (int c = threadIdx.x % 32; c < kTile; c += 32) left[c] = 0.0;
    for_each_pair<1>(t, [&](int64_t v, float a, float b) {
      const Pair at = pair(a, b);
      both += at.p + at.q;
      left[static_cast<int>(v % kTile)] = at.left();
    });
    __syncwarp();
    return warp_sum(both);
  }
};

}  // namespace randfuse::cuda
