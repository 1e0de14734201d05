// The vector vocabulary of the CPU kernels, once per instruction set. No include guard: an
// implementation includes it inside namespace randfuse::RF_ISA (see for_each_isa.h).
//
//   F32               kF32 floats; load/store convert from and to half, bfloat16 and float
//   Keep              64 decisions of one row, for 64 consecutive stream columns (8 Philox blocks)
//   kept(keep, v, x)  x where decision v*kF32 + lane keeps, else 0
//
// A Philox word lives in the low half of a 64-bit lane: one widening multiply yields its high and low
// product at once, and the rubbish it leaves in upper halves is ignored by the next multiply.

#if RF_LEVEL == RF_AVX512

using F32 = __m512;
constexpr int kF32 = 16;
struct Keep {
  __mmask32 half[2];
};

inline Keep keep64(uint64_t key, uint32_t i, uint32_t j0, uint32_t s, uint32_t d, uint32_t t) {
  // Lane order 0 4 1 5 2 6 3 7 of the eight blocks makes the unpacks below yield column order.
  const __m512i step = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(j0), step), c1 = _mm512_set1_epi64(i);
  __m512i c2 = _mm512_set1_epi64(s), c3 = _mm512_set1_epi64(d);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < kMaskRounds; ++round) {
    const __m512i a = _mm512_mul_epu32(c0, m0), b = _mm512_mul_epu32(c2, m1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1, _mm512_set1_epi64(k0), 0x96);
    c1 = b;
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3, _mm512_set1_epi64(k1), 0x96);
    c3 = a;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const __m512i r01 = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
  const __m512i r23 = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
  const __m512i bound = _mm512_set1_epi16(static_cast<short>(t));
  return {{_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(r01, r23), bound),
           _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(r01, r23), bound)}};
}

inline uint64_t keep_bits(const Keep& k) {
  return static_cast<uint64_t>(k.half[1]) << 32 | k.half[0];
}
inline F32 kept(const Keep& k, int v, F32 x) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(k.half[v >> 1] >> (v & 1) * 16), x);
}

inline F32 broadcast(float x) { return _mm512_set1_ps(x); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }

inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32 load(const half_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 load(const bfloat16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline void store(half_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(bfloat16_t* p, F32 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7FFF));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}

#elif RF_LEVEL == RF_AVX2

using F32 = __m256;
constexpr int kF32 = 8;
struct Keep {
  __m256i quarter[4];  // 16 lanes of all-ones or zero
};

inline Keep keep64(uint64_t key, uint32_t i, uint32_t j0, uint32_t s, uint32_t d, uint32_t t) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i bound = _mm256_set1_epi16(static_cast<short>(t));
  Keep keep;
  // Two independent groups of four blocks; lane order 0 2 1 3 makes the unpacks yield column order.
  __m256i c0[2], c1[2], c2[2], c3[2];
  for (int g = 0; g < 2; ++g) {
    c0[g] = _mm256_add_epi64(_mm256_set1_epi64x(j0), g ? _mm256_set_epi64x(7, 5, 6, 4)
                                                       : _mm256_set_epi64x(3, 1, 2, 0));
    c1[g] = _mm256_set1_epi64x(i);
    c2[g] = _mm256_set1_epi64x(s);
    c3[g] = _mm256_set1_epi64x(d);
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < kMaskRounds; ++round) {
    const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
      const __m256i a = _mm256_mul_epu32(c0[g], m0), b = _mm256_mul_epu32(c2[g], m1);
      c0[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), c1[g]), key0);
      c1[g] = b;
      c2[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), c3[g]), key1);
      c3[g] = a;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
#pragma GCC unroll 2
  for (int g = 0; g < 2; ++g) {
    const __m256i r01 = _mm256_blend_epi32(c0[g], _mm256_slli_epi64(c1[g], 32), 0xAA);
    const __m256i r23 = _mm256_blend_epi32(c2[g], _mm256_slli_epi64(c3[g], 32), 0xAA);
    const __m256i lo = _mm256_unpacklo_epi64(r01, r23), hi = _mm256_unpackhi_epi64(r01, r23);
    keep.quarter[2 * g] = _mm256_cmpeq_epi16(_mm256_max_epu16(lo, bound), lo);
    keep.quarter[2 * g + 1] = _mm256_cmpeq_epi16(_mm256_max_epu16(hi, bound), hi);
  }
  return keep;
}

inline uint64_t keep_bits(const Keep& k) {
  uint64_t bits = 0;
  for (int h = 0; h < 2; ++h) {
    const __m256i packed = _mm256_permute4x64_epi64(
        _mm256_packs_epi16(k.quarter[2 * h], k.quarter[2 * h + 1]), 0xD8);
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(packed))) << 32 * h;
  }
  return bits;
}
inline F32 kept(const Keep& k, int v, F32 x) {
  const __m256i quarter = k.quarter[v >> 1];
  const __m128i eight =
      v & 1 ? _mm256_extracti128_si256(quarter, 1) : _mm256_castsi256_si128(quarter);
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cvtepi16_epi32(eight)), x);
}

inline F32 broadcast(float x) { return _mm256_set1_ps(x); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }

inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline F32 load(const half_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F32 load(const bfloat16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
inline void store(half_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(bfloat16_t* p, F32 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7FFF));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  r = _mm256_srli_epi32(r, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else  // portable: GCC and clang vector extensions (SSE2, NEON, ...)

typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));
constexpr int kF32 = 4;
struct Keep {
  uint64_t bits;
};

inline Keep keep64(uint64_t key, uint32_t i, uint32_t j0, uint32_t s, uint32_t d, uint32_t t) {
  // Arrays over the eight blocks: the compiler's vectoriser turns each loop into widening multiplies.
  uint64_t c0[8], c1[8], c2[8], c3[8];
  for (int b = 0; b < 8; ++b) {
    c0[b] = j0 + static_cast<uint32_t>(b);
    c1[b] = i;
    c2[b] = s;
    c3[b] = d;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kMaskRounds; ++round) {
    for (int b = 0; b < 8; ++b) {
      const uint64_t a = kPhiloxM0 * (c0[b] & 0xFFFFFFFFu), m = kPhiloxM1 * (c2[b] & 0xFFFFFFFFu);
      c0[b] = m >> 32 ^ c1[b] ^ k0;
      c1[b] = m;
      c2[b] = a >> 32 ^ c3[b] ^ k1;
      c3[b] = a;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  Keep keep{0};
  for (int b = 0; b < 8; ++b) {
    const uint32_t words[4] = {static_cast<uint32_t>(c0[b]), static_cast<uint32_t>(c1[b]),
                               static_cast<uint32_t>(c2[b]), static_cast<uint32_t>(c3[b])};
    uint64_t byte = 0;
    for (int w = 0; w < 4; ++w) {
      byte |= static_cast<uint64_t>((words[w] & 0xFFFFu) >= t) << 2 * w;
      byte |= static_cast<uint64_t>(words[w] >> 16 >= t) << (2 * w + 1);
    }
    keep.bits |= byte << 8 * b;
  }
  return keep;
}

inline uint64_t keep_bits(const Keep& k) { return k.bits; }
inline F32 kept(const Keep& k, int v, F32 x) {
  const int32_t nibble = static_cast<int32_t>(k.bits >> 4 * v & 0xFu);
  const I32 lane = {1, 2, 4, 8};
  const I32 mask = (I32{nibble, nibble, nibble, nibble} & lane) == lane;
  return reinterpret_cast<F32>(reinterpret_cast<I32>(x) & mask);
}

inline F32 broadcast(float x) { return F32{x, x, x, x}; }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }

inline F32 load(const float* p) {
  F32 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }
template <class T>
inline F32 load(const T* p) {
  return F32{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
inline void store(T* p, F32 x) {
  for (int l = 0; l < 4; ++l) p[l] = from_float<T>(x[l]);
}

#endif

constexpr int kGroup = 64;  // stream columns that one keep64 decides
