// Two words -> two independent standard normals (Box, Muller 1958) in float32, for host and device.
// Sums, products and fma only, beside one correctly rounded square root: with fma every backend
// returns the same bits, within 2 ulp of docs/streams.md's definition. |z| < 6.67.
#pragma once
#include <cstdint>
#include <cstring>

#include "philox.h"

// Inlined into code for each instruction set: a copy of its own would be compiled for none of them.
#define RF_INLINE RF_HD __attribute__((always_inline))

namespace randfuse {

RF_INLINE float fma32(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#else  // one instruction where the caller's target has it, else a call of the C library
  return __builtin_fmaf(a, b, c);
#endif
}

RF_INLINE int32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

RF_INLINE float float_of(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// w | 1 rounded to 24 bits, by halves of 16 which are exact: every unit rounds alike.
RF_INLINE float odd_word(uint32_t w) {
  const float high = static_cast<float>(static_cast<int32_t>(w >> 16));
  return high * 65536.0f + static_cast<float>(static_cast<int32_t>((w & 0xFFFFu) | 1u));
}

// -2 log(u) of u = odd_word(w) 2^-32 in (0, 1]. u = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2): f is
// exact, so the result keeps its relative accuracy where u is near 1.
RF_INLINE float minus_two_log(uint32_t w) {
  const int32_t bits = bits_of(odd_word(w)), root = 0x3F3504F3;
  const int32_t k = (bits - root) >> 23;
  const float f = float_of(bits - k * (1 << 23)) - 1.0f, n = static_cast<float>(k - 32);
  float p = 0x1.14573ep-4f;
  p = fma32(p, f, -0x1.de3bf8p-4f);
  p = fma32(p, f, 0x1.e6f08cp-4f);
  p = fma32(p, f, -0x1.fc220ep-4f);
  p = fma32(p, f, 0x1.233766p-3f);
  p = fma32(p, f, -0x1.555c4ep-3f);
  p = fma32(p, f, 0x1.99a4b6p-3f);
  p = fma32(p, f, -0x1.000006p-2f);
  p = fma32(p, f, 0x1.555548p-2f);
  const float square = f * f;
  const float log1p = fma32(square, fma32(f, p, -0.5f), f);
  return -2.0f * fma32(n, 0x1.62e43p-1f, log1p);
}

struct Turn {
  float cosine, sine;
};

// cos and sin of (pi / 2)(q + x): q the upper 2 bits of w, x in [-1/2, 1/2) the others, 24 bits.
RF_INLINE Turn turn(uint32_t w) {
  const float x = static_cast<float>(static_cast<int32_t>(w << 2)) * 0x1p-32f, t = x * x;
  float s = 0x1.4bc256p-13f;
  s = fma32(s, t, -0x1.32ca86p-8f);
  s = fma32(s, t, 0x1.466bbap-4f);
  s = fma32(s, t, -0x1.4abbcep-1f);
  s = fma32(x, 0x1.921fb6p+0f, x * fma32(s, t, -0x1.777a5cp-25f));  // pi / 2 in two parts
  float c = 0x1.d9f7bap-11f;
  c = fma32(c, t, -0x1.55c664p-6f);
  c = fma32(c, t, 0x1.03c1dep-2f);
  c = fma32(c, t, -0x1.3bd3ccp+0f);
  c = fma32(c, t, 1.0f);
  // Quarter turns: (c, s), (-s, c), (-c, -s), (s, -c).
  const int32_t swap = -static_cast<int32_t>(w >> 30 & 1u), cb = bits_of(c), sb = bits_of(s);
  const int32_t sign = static_cast<int32_t>(w & 0x80000000u);
  const int32_t cosine = (cb & ~swap) | (sb & swap), sine = (sb & ~swap) | (cb & swap);
  return {float_of(cosine ^ sign ^ static_cast<int32_t>(w << 1 & 0x80000000u)),
          float_of(sine ^ sign)};
}

}  // namespace randfuse

#undef RF_INLINE
