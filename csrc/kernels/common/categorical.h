// What every backend of the categorical sampler and of speculative acceptance agrees on: tiles of
// the vocabulary, their statistics, the coins, and the order in which filters keep tokens.
//
// One read of the raw logits z leaves (max, sum of exp((z - max) / T)) of each tile of 1024 tokens.
// A draw takes 53 of 64 bits to pick a tile by its mass and 53 of 64 others to pick a token in it,
// in float64, from a second read of that tile alone; a rescaled uniform is never used twice.
//
// Sums in the tiles are float32. Their relative error has a bound, kSumError, so wherever the coin
// lies further than that from the edge of a tile the choice is that of float64; where it does not
// (twice the bound times the number of tiles: 4e-4 of the rows at V = 50257), the sums are taken
// again in float64. So every instruction set, backend and order of summation picks the same tokens.
#pragma once
#include "exponential.h"

namespace randfuse {

inline constexpr int kTile = 1024;  // tokens; part of the contract
inline constexpr int64_t kMaxVocab = int64_t{1} << 20;
inline constexpr int kMaxTiles = static_cast<int>(kMaxVocab / kTile);

// Bound of the relative error of a float32 tile sum: exponentials (argument 3 roundings, whose
// effect is |x| exp(x) on a sum of at least 1: at most 5 * 3 * 2^-24; polynomial 2^-22) and a sum
// of 16 terms a lane and 7 steps across (23 * 2^-24). Together 2.5e-6.
inline constexpr double kSumError = 0x1p-18;

template <class Z>
struct TileStats {
  Z max;         // NaN left out; -inf if there is nothing else
  Z second;      // of the rest, equal to max if two tokens are; only with `dot`
  double sum;    // of exp((z - max) / T), 0 where max is not finite
  double dot;    // of exp(x) x, x = (z - max) / T
  bool has_nan;  // known where the sum did not come out as a number, which is where it matters
};

// exp((z - max) / T); 0 for -inf and NaN. `inverse` is 1 / T: a division costs as much as all else.
template <class Z>
RF_INLINE double weight64(Z z, Z max, double inverse) {
  return exp64((static_cast<double>(z) - static_cast<double>(max)) * inverse);
}

// Mass of a tile relative to a token at the row's maximum.
template <class Z>
RF_INLINE double tile_mass(const TileStats<Z>& tile, Z row_max, double inverse) {
  return tile.sum == 0.0 ? 0.0 : tile.sum * weight64(tile.max, row_max, inverse);
}

RF_HD uint32_t draw_domain() { return domain_word(static_cast<uint32_t>(Op::kCategorical), 5); }
RF_HD uint32_t accept_domain() { return domain_word(static_cast<uint32_t>(Op::kAcceptCoin), 5); }
RF_HD uint32_t residual_domain() { return domain_word(static_cast<uint32_t>(Op::kResidual), 5); }
RF_HD uint32_t race_high_domain() { return domain_word(static_cast<uint32_t>(Op::kRaceHigh), 5); }
RF_HD uint32_t race_low_domain() { return domain_word(static_cast<uint32_t>(Op::kRaceLow), 5); }

// u in [0, 1): u * S < S for every S, and u = 0 still skips what has no mass.
RF_HD double coin53(uint32_t low, uint32_t high) {
  return static_cast<double>(static_cast<uint64_t>(high) << 21 | low >> 11) * 0x1p-53;
}

// Classifier-free guidance, l_u + (scale + 1) (l - l_u), each step rounded: no fma anywhere.
template <class Z>
RF_INLINE Z guided(Z logit, Z uncond, Z scale_plus_one) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(uncond, __fmul_rn(scale_plus_one, __fsub_rn(logit, uncond)));
#else
  const Z step = scale_plus_one * (logit - uncond);
  return uncond + step;
#endif
}

// The logit whose probability is that of a and b together: T log(exp(a / T) + exp(b / T)).
template <class Z>
RF_INLINE Z joined(Z a, Z b, double temperature) {
  if (a != a || b != b) return static_cast<Z>(NAN);
  const Z high = a > b ? a : b, low = a > b ? b : a;
  if (low == static_cast<Z>(-INFINITY) || high == static_cast<Z>(INFINITY)) return high;
  const double gap = static_cast<double>(low) - static_cast<double>(high);
  const double more = product64(temperature, log64(1.0 + exp64(gap / temperature)));
  return static_cast<Z>(static_cast<double>(high) + more);
}

// Unsigned integers in the order of the floats; NaN is below -inf, -0 is +0.
RF_INLINE uint32_t order_key(float z) {
  if (z != z) return 0;
  z += 0.0f;
  uint32_t u;
#if defined(__CUDA_ARCH__)
  u = __float_as_uint(z);
#else
  std::memcpy(&u, &z, sizeof u);
#endif
  return u >> 31 ? ~u : u | 0x80000000u;
}
RF_INLINE uint64_t order_key(double z) {
  if (z != z) return 0;
  const uint64_t u = static_cast<uint64_t>(to_bits(z + 0.0));
  return u >> 63 ? ~u : u | 0x8000000000000000u;
}
RF_INLINE void from_order_key(uint32_t key, float* z) {
  const uint32_t u = key >> 31 ? key & 0x7FFFFFFFu : ~key;
#if defined(__CUDA_ARCH__)
  *z = __uint_as_float(u);
#else
  std::memcpy(z, &u, sizeof u);
#endif
}
RF_INLINE void from_order_key(uint64_t key, double* z) {
  *z = from_bits(static_cast<int64_t>(key >> 63 ? key & 0x7FFFFFFFFFFFFFFFu : ~key));
}

// top_k, top_p and min_p each keep a prefix of one order: larger logits first, equal ones by index.
// So together they keep a prefix, and its last token says all.
template <class Z>
struct Cut {
  Z value;
  int64_t last;  // tokens equal to value are kept up to this index

  RF_HD bool keeps(Z z, int64_t token) const { return z > value || (z == value && token <= last); }
  RF_HD bool stricter_than(const Cut& other) const {
    return value > other.value || (value == other.value && last < other.last);
  }
};

}  // namespace randfuse
