// exp, log and the exponential of a race in float64, for host and device. Sums, products, fma and
// bit shifts only, so every backend rounds alike; libm and -ffp-contract have no say.
#pragma once
#include <cstring>

#include "streams.h"

// Inlined into the caller's instruction set on the host, where fma is then an instruction and a
// loop over tokens a loop over vectors.
#if defined(__CUDACC__)
#define RF_INLINE RF_HD
#else
#define RF_INLINE inline __attribute__((always_inline))
#endif

namespace randfuse {

RF_INLINE double fma64(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// a b rounded: never part of an fma, so that equal factors give equal products.
RF_INLINE double product64(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

RF_INLINE double from_bits(int64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(bits);
#else
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

RF_INLINE int64_t to_bits(double x) {
#if defined(__CUDA_ARCH__)
  return __double_as_longlong(x);
#else
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// exp(x) for x <= 0 within 2 ulp; 0 below -708, where weights relative to the largest are nothing,
// and for NaN. x = n ln 2 + r with |r| <= ln 2 / 2; Taylor's series, whose 14th term is 2^-57.
RF_INLINE double exp64(double x) {
  const double shift =
      0x1.8p52;  // adding it rounds to an integer, which then stands in the low bits
  const double shifted = fma64(x, 0x1.71547652b82fep0, shift), n = shifted - shift;
  const double r = fma64(n, -0x1.abc9e3b39803fp-56, fma64(n, -0x1.62e42fefa39efp-1, x));
  double p = 1.0 / 6227020800;
  p = fma64(p, r, 1.0 / 479001600);
  p = fma64(p, r, 1.0 / 39916800);
  p = fma64(p, r, 1.0 / 3628800);
  p = fma64(p, r, 1.0 / 362880);
  p = fma64(p, r, 1.0 / 40320);
  p = fma64(p, r, 1.0 / 5040);
  p = fma64(p, r, 1.0 / 720);
  p = fma64(p, r, 1.0 / 120);
  p = fma64(p, r, 1.0 / 24);
  p = fma64(p, r, 1.0 / 6);
  p = fma64(p, r, 0.5);
  p = fma64(p, r, 1.0);
  p = fma64(p, r, 1.0);
  const double y = from_bits(static_cast<int64_t>(static_cast<uint64_t>(to_bits(p)) +
                                                  (static_cast<uint64_t>(to_bits(shifted)) << 52)));
  return x >= -708.0 ? y : 0.0;
}

// 2 artanh(s) for |s| <= 0.172: the 12th term is below 2^-60 of the first.
RF_INLINE double two_artanh(double s) {
  const double q = s * s;
  double p = 2.0 / 23;
  p = fma64(p, q, 2.0 / 21);
  p = fma64(p, q, 2.0 / 19);
  p = fma64(p, q, 2.0 / 17);
  p = fma64(p, q, 2.0 / 15);
  p = fma64(p, q, 2.0 / 13);
  p = fma64(p, q, 2.0 / 11);
  p = fma64(p, q, 2.0 / 9);
  p = fma64(p, q, 2.0 / 7);
  p = fma64(p, q, 2.0 / 5);
  p = fma64(p, q, 2.0 / 3);
  return fma64(p * q, s, 2.0 * s);
}

// log(x) of a positive normal number: x = 2^k m, m in [sqrt(1/2), sqrt(2)),
// log m = 2 artanh((m - 1) / (m + 1)).
RF_INLINE double log64(double x) {
  const int64_t bits = to_bits(x), root = to_bits(0x1.6a09e667f3bcdp-1);
  const int64_t k = (bits - root) >> 52;
  const double m = from_bits(bits - static_cast<int64_t>(static_cast<uint64_t>(k) << 52));
  const double n = static_cast<double>(k);
  const double log_m = two_artanh((m - 1.0) / (m + 1.0));
  return fma64(n, 0x1.62e42fefa39efp-1, fma64(n, 0x1.abc9e3b39803fp-56, log_m));
}

// E = -log1p(-v), v = (r64 + 1/2) 2^-64, without cancellation at either end: E is never 0 or inf.
RF_HD double race_exponential(uint32_t high, uint32_t low) {
  const double v = (high * 0x1p32 + (low + 0.5)) * 0x1p-64;
  if (v < 0.25) return two_artanh(v / (2.0 - v));
  return -log64((~high * 0x1p32 + (~low + 0.5)) * 0x1p-64);
}

}  // namespace randfuse
