// The vector vocabulary of the CPU kernels, once per instruction set. No include guard: an
// implementation includes it inside namespace randfuse::RF_ISA (see for_each_isa.h).
//
//   F32                kF32 floats; load/store convert from and to half, bfloat16 and float
//   Row                what all columns of a row share: row_of(key, i, s, domain)
//   Keep               64 decisions of a row: keep64(row, j0, threshold), blocks j0 ... j0 + 7
//   store_bools(p, k)  the 64 decisions as bytes
//   kept(keep, v, x)   x where decision v * kF32 + lane keeps, else 0
//   drop(keep, in, out, scale)   the 64 values of a group: in * scale where kept, else 0
//   words32(row, j0, out)   32 words in column order, blocks j0 ... j0 + 7, 10 rounds
//
// A Philox word lives in the low half of a 64-bit lane: one widening multiply yields its high and
// low product at once, and the rubbish it leaves in upper halves is ignored by the next multiply.

struct Row {  // 32-bit words, wide for broadcast loads
  uint64_t c2, c0, x2, x3, k0[kWordRounds], k1[kWordRounds];
};

// Rounds 1 and 2 of Philox as far as they do not depend on the column block j:
//   round 1  c2' = hi(M0 j) ^ c2    c3' = lo(M0 j), the other two words are the same for all j
//   round 2  c0' = hi(M1 c2') ^ c0  c1' = lo(M1 c2')  c2'' = c3' ^ x2  c3'' = x3
inline Row row_of(uint64_t key, uint32_t i, uint32_t s, uint32_t d) {
  Row w;
  for (uint32_t r = 0; r < kWordRounds; ++r) {
    w.k0[r] = static_cast<uint32_t>(static_cast<uint32_t>(key) + r * kPhiloxW0);
    w.k1[r] = static_cast<uint32_t>(static_cast<uint32_t>(key >> 32) + r * kPhiloxW1);
  }
  const uint64_t b1 = static_cast<uint64_t>(kPhiloxM1) * s;
  const uint32_t c0 = static_cast<uint32_t>(b1 >> 32 ^ i ^ w.k0[0]);
  const uint64_t a2 = static_cast<uint64_t>(kPhiloxM0) * c0;
  w.c2 = d ^ w.k1[0];
  w.c0 = static_cast<uint32_t>(b1) ^ w.k0[1];
  w.x2 = static_cast<uint32_t>(a2 >> 32) ^ w.k1[1];
  w.x3 = static_cast<uint32_t>(a2);
  return w;
}

#if RF_LEVEL == RF_AVX512

using F32 = __m512;
constexpr int kF32 = 16;
struct Keep {
  __mmask32 half[2];
};

// High words to the low halves, on the shuffle port: shifts would share theirs with the multiplies.
inline __m512i all(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline __m512i high(__m512i x) { return _mm512_shuffle_epi32(x, _MM_PERM_DDBB); }

struct Pairs {
  __m512i r01, r23;  // words 0 and 1, 2 and 3 of a block in each 64-bit lane
};

// Lane order 0 4 1 5 2 6 3 7 of the eight blocks makes unpacks of the pairs yield column order.
template <int kRounds>
inline Pairs blocks8(const Row& row, uint32_t j0) {
  const __m512i step = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i a1 = _mm512_mul_epu32(_mm512_add_epi64(_mm512_set1_epi64(j0), step), m0);
  const __m512i b2 = _mm512_mul_epu32(_mm512_xor_si512(high(a1), all(row.c2)), m1);
  __m512i a = _mm512_mul_epu32(_mm512_xor_si512(high(b2), all(row.c0)), m0);
  __m512i b = _mm512_mul_epu32(_mm512_xor_si512(a1, all(row.x2)), m1);
  __m512i c0 = _mm512_ternarylogic_epi64(high(b), b2, all(row.k0[2]), 0x96);
  __m512i c2 = _mm512_ternarylogic_epi64(high(a), all(row.x3), all(row.k1[2]), 0x96);
  __m512i c1 = b, c3 = a;
#pragma GCC unroll 10
  for (int round = 3; round < kRounds; ++round) {
    a = _mm512_mul_epu32(c0, m0);
    b = _mm512_mul_epu32(c2, m1);
    c0 = _mm512_ternarylogic_epi64(high(b), c1, all(row.k0[round]), 0x96);
    c2 = _mm512_ternarylogic_epi64(high(a), c3, all(row.k1[round]), 0x96);
    c1 = b;
    c3 = a;
  }
  return {_mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA),
          _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA)};
}

inline Keep keep64(const Row& row, uint32_t j0, uint32_t t) {
  const Pairs p = blocks8<kMaskRounds>(row, j0);
  const __m512i bound = _mm512_set1_epi16(static_cast<short>(t));
  return {{_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(p.r01, p.r23), bound),
           _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(p.r01, p.r23), bound)}};
}

inline void words32(const Row& row, uint32_t j0, uint32_t* out) {
  const Pairs p = blocks8<kWordRounds>(row, j0);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(p.r01, p.r23));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(p.r01, p.r23));
}

inline uint64_t keep_bits(const Keep& k) {
  return static_cast<uint64_t>(k.half[1]) << 32 | k.half[0];
}
inline void store_bools(bool* p, const Keep& k) {
  const __m512i one = _mm512_set1_epi8(1);
  _mm512_storeu_si512(p, _mm512_maskz_mov_epi8(keep_bits(k), one));
}
inline F32 kept(const Keep& k, int v, F32 x) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(k.half[v >> 1] >> (v & 1) * 16), x);
}

inline F32 broadcast(float x) { return _mm512_set1_ps(x); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
// NaN passes both, as in torch.relu and its derivative.
inline F32 relu(F32 x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }
inline F32 relu_grad(F32 grad, F32 x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), grad);
}
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
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u,
                           _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}

// bfloat16 as the halves of 32-bit lanes: no widening or narrowing shuffles, and a 16-bit select.
// The product is a NaN only where x is one, and then its low half is 0: rounding cannot carry into
// it.
inline __m512i scaled_bits(__m512i x, F32 scale) {
  const __m512i u = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(x), scale));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7FFF));
}
inline void drop(const Keep& k, const bfloat16_t* in, bfloat16_t* out, F32 scale) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i x = _mm512_loadu_si512(in + 32 * h);
    const __m512i high = scaled_bits(_mm512_and_si512(x, _mm512_set1_epi32(-0x10000)), scale);
    const __m512i low = scaled_bits(_mm512_slli_epi32(x, 16), scale);
    const __m512i y = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(low, 16), high);
    _mm512_storeu_si512(out + 32 * h, _mm512_maskz_mov_epi16(k.half[h], y));
  }
}

#elif RF_LEVEL == RF_AVX2

using F32 = __m256;
constexpr int kF32 = 8;
struct Keep {
  __m256i quarter[4];  // 16 lanes of all-ones or zero
};

inline __m256i all(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline __m256i high(__m256i x) { return _mm256_shuffle_epi32(x, 0xF5); }

struct Pairs {
  __m256i r01, r23;  // words 0 and 1, 2 and 3 of a block in each 64-bit lane
};

// Lane order 0 2 1 3 of the four blocks makes unpacks of the pairs yield column order.
template <int kRounds>
inline Pairs blocks4(const Row& row, uint32_t j0) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i step = _mm256_set_epi64x(3, 1, 2, 0);
  const __m256i a1 = _mm256_mul_epu32(_mm256_add_epi64(_mm256_set1_epi64x(j0), step), m0);
  const __m256i b2 = _mm256_mul_epu32(_mm256_xor_si256(high(a1), all(row.c2)), m1);
  __m256i a = _mm256_mul_epu32(_mm256_xor_si256(high(b2), all(row.c0)), m0);
  __m256i b = _mm256_mul_epu32(_mm256_xor_si256(a1, all(row.x2)), m1);
  __m256i c0 = _mm256_xor_si256(_mm256_xor_si256(high(b), b2), all(row.k0[2]));
  __m256i c2 = _mm256_xor_si256(_mm256_xor_si256(high(a), all(row.x3)), all(row.k1[2]));
  __m256i c1 = b, c3 = a;
#pragma GCC unroll 10
  for (int round = 3; round < kRounds; ++round) {
    a = _mm256_mul_epu32(c0, m0);
    b = _mm256_mul_epu32(c2, m1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(high(b), c1), all(row.k0[round]));
    c2 = _mm256_xor_si256(_mm256_xor_si256(high(a), c3), all(row.k1[round]));
    c1 = b;
    c3 = a;
  }
  return {_mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA),
          _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA)};
}

inline Keep keep64(const Row& row, uint32_t j0, uint32_t t) {
  const __m256i bound = _mm256_set1_epi16(static_cast<short>(t));
  Keep keep;
#pragma GCC unroll 2
  for (int g = 0; g < 2; ++g) {
    const Pairs p = blocks4<kMaskRounds>(row, j0 + 4 * g);
    const __m256i lo = _mm256_unpacklo_epi64(p.r01, p.r23);
    const __m256i hi = _mm256_unpackhi_epi64(p.r01, p.r23);
    keep.quarter[2 * g] = _mm256_cmpeq_epi16(_mm256_max_epu16(lo, bound), lo);
    keep.quarter[2 * g + 1] = _mm256_cmpeq_epi16(_mm256_max_epu16(hi, bound), hi);
  }
  return keep;
}

inline void words32(const Row& row, uint32_t j0, uint32_t* out) {
  for (int g = 0; g < 2; ++g) {
    const Pairs p = blocks4<kWordRounds>(row, j0 + 4 * g);
    const __m256i lo = _mm256_unpacklo_epi64(p.r01, p.r23);
    const __m256i hi = _mm256_unpackhi_epi64(p.r01, p.r23);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * g), lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * g + 8), hi);
  }
}

inline uint64_t keep_bits(const Keep& k) {
  uint64_t bits = 0;
  for (int h = 0; h < 2; ++h) {
    const __m256i packed =
        _mm256_permute4x64_epi64(_mm256_packs_epi16(k.quarter[2 * h], k.quarter[2 * h + 1]), 0xD8);
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(packed))) << 32 * h;
  }
  return bits;
}
inline void store_bools(bool* p, const Keep& k) {
  for (int h = 0; h < 2; ++h) {
    const __m256i packed =
        _mm256_permute4x64_epi64(_mm256_packs_epi16(k.quarter[2 * h], k.quarter[2 * h + 1]), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * h),
                        _mm256_and_si256(packed, _mm256_set1_epi8(1)));
  }
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
inline F32 relu(F32 x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }
inline F32 relu_grad(F32 grad, F32 x) {
  return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ), grad);
}
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

inline __m256i scaled_bits(__m256i x, F32 scale) {  // see AVX-512
  const __m256i u = _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(x), scale));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7FFF));
}
inline void drop(const Keep& k, const bfloat16_t* in, bfloat16_t* out, F32 scale) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 16 * q));
    const __m256i high = scaled_bits(_mm256_and_si256(x, _mm256_set1_epi32(-0x10000)), scale);
    const __m256i low = scaled_bits(_mm256_slli_epi32(x, 16), scale);
    const __m256i y = _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * q),
                        _mm256_and_si256(k.quarter[q], y));
  }
}

#else  // portable: GCC and clang vector extensions (SSE2, NEON, ...)

typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));
constexpr int kF32 = 4;
struct Keep {
  uint64_t bits;
};

struct Blocks {
  uint64_t c0[8], c1[8], c2[8], c3[8];
};

// Arrays over the eight blocks: the compiler's vectoriser turns each loop into widening multiplies.
template <int kRounds>
inline Blocks blocks8(const Row& row, uint32_t j0) {
  Blocks w;
  for (int l = 0; l < 8; ++l) {
    const uint64_t a1 = kPhiloxM0 * static_cast<uint64_t>(j0 + static_cast<uint32_t>(l));
    const uint64_t b2 = kPhiloxM1 * static_cast<uint64_t>(static_cast<uint32_t>(a1 >> 32 ^ row.c2));
    w.c0[l] = b2 >> 32 ^ row.c0;
    w.c1[l] = b2;
    w.c2[l] = a1 ^ row.x2;
    w.c3[l] = row.x3;
  }
  for (int round = 2; round < kRounds; ++round) {
    for (int l = 0; l < 8; ++l) {
      const uint64_t a = kPhiloxM0 * (w.c0[l] & 0xFFFFFFFFu);
      const uint64_t b = kPhiloxM1 * (w.c2[l] & 0xFFFFFFFFu);
      w.c0[l] = b >> 32 ^ w.c1[l] ^ row.k0[round];
      w.c1[l] = b;
      w.c2[l] = a >> 32 ^ w.c3[l] ^ row.k1[round];
      w.c3[l] = a;
    }
  }
  return w;
}

inline void words_of(const Blocks& w, int b, uint32_t* out) {
  out[0] = static_cast<uint32_t>(w.c0[b]);
  out[1] = static_cast<uint32_t>(w.c1[b]);
  out[2] = static_cast<uint32_t>(w.c2[b]);
  out[3] = static_cast<uint32_t>(w.c3[b]);
}

inline Keep keep64(const Row& row, uint32_t j0, uint32_t t) {
  const Blocks blocks = blocks8<kMaskRounds>(row, j0);
  Keep keep{0};
  for (int b = 0; b < 8; ++b) {
    uint32_t words[4];
    words_of(blocks, b, words);
    uint64_t byte = 0;
    for (int w = 0; w < 4; ++w) {
      byte |= static_cast<uint64_t>((words[w] & 0xFFFFu) >= t) << 2 * w;
      byte |= static_cast<uint64_t>(words[w] >> 16 >= t) << (2 * w + 1);
    }
    keep.bits |= byte << 8 * b;
  }
  return keep;
}

inline void words32(const Row& row, uint32_t j0, uint32_t* out) {
  const Blocks blocks = blocks8<kWordRounds>(row, j0);
  for (int b = 0; b < 8; ++b) words_of(blocks, b, out + 4 * b);
}

inline uint64_t keep_bits(const Keep& k) { return k.bits; }
inline void store_bools(bool* p, const Keep& k) {
  for (int l = 0; l < 64; ++l) p[l] = k.bits >> l & 1;
}
inline F32 kept(const Keep& k, int v, F32 x) {
  const int32_t nibble = static_cast<int32_t>(k.bits >> 4 * v & 0xFu);
  const I32 lane = {1, 2, 4, 8};
  const I32 mask = (I32{nibble, nibble, nibble, nibble} & lane) == lane;
  return reinterpret_cast<F32>(reinterpret_cast<I32>(x) & mask);
}

inline F32 broadcast(float x) { return F32{x, x, x, x}; }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 relu(F32 x) { return reinterpret_cast<F32>(reinterpret_cast<I32>(x) & ~(x <= 0.0f)); }
inline F32 relu_grad(F32 grad, F32 x) {
  return reinterpret_cast<F32>(reinterpret_cast<I32>(grad) & ~(x <= 0.0f));
}
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

template <class T>
inline void drop(const Keep& k, const T* in, T* out, F32 scale) {
#pragma GCC unroll 16
  for (int v = 0; v < kGroup / kF32; ++v)
    store(out + v * kF32, kept(k, v, mul(load(in + v * kF32), scale)));
}
