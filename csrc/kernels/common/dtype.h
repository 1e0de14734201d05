// Storage types of the torch-free kernels. half and bfloat16 are their 16 bits; arithmetic is
// float32.
#pragma once
#include <cstdint>
#include <cstring>

namespace randfuse {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

inline float to_float(bfloat16_t x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline float to_float(half_t x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  uint32_t u;
  if (magnitude >= 0x7C00u) {  // inf, NaN
    u = sign | 0x7F800000u | magnitude << 13;
  } else if (magnitude >= 0x0400u) {
    u = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // subnormal: an exact multiple of 2^-24
    const float f = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&u, &f, sizeof u);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bfloat16_t from_float<bfloat16_t>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  if (x != x) return {static_cast<uint16_t>(u >> 16 | 0x0040u)};
  return {static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1u)) >> 16)};
}

template <>
inline half_t from_float<half_t>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  const uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // rounds to inf
  if (magnitude < 0x38800000u) {  // subnormal: let an addition at 2^-24 granularity round
    float f;
    std::memcpy(&f, &magnitude, sizeof f);
    f += 0.5f;
    std::memcpy(&u, &f, sizeof u);
    return {static_cast<uint16_t>(sign | (u - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

}  // namespace randfuse
