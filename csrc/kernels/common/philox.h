// Philox4x32 (Salmon et al., SC'11): the only source of random bits in randfuse.
// Host, device and the SIMT executor compile this same text; docs/streams.md is the specification.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define RF_HD __host__ __device__ __forceinline__
#else
#define RF_HD inline
#endif

namespace randfuse {

inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments

struct alignas(16) Words {  // 128 bits: r[0] is the least significant word
  uint32_t r[4];
};

template <int kRounds>
RF_HD Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                       uint32_t k1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    // One 32x32->64 product per multiplier; nvcc turns it into IMAD.WIDE.
    const uint64_t a = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t b = static_cast<uint64_t>(kPhiloxM1) * c2;
    const uint32_t hi_a = static_cast<uint32_t>(a >> 32), hi_b = static_cast<uint32_t>(b >> 32);
    c0 = hi_b ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = hi_a ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace randfuse
