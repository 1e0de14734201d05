// Float32 arithmetic that rows of logits need, once per instruction set. Included after simd.h, and
// like it. NaN: larger(z, acc) leaves acc, smaller(acc, z) and exp2 yield it.

#if RF_LEVEL == RF_AVX512

inline F32 larger(F32 z, F32 acc) { return _mm512_max_ps(z, acc); }
inline F32 smaller(F32 acc, F32 z) { return _mm512_min_ps(acc, z); }
// t - floor(t), 0 for -inf; and p 2^floor(t).
inline F32 fraction(F32 t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF); }
inline F32 times_power(F32 p, F32 t) { return _mm512_scalef_ps(p, t); }
// The upper 24 bits of 16 words as floats, and the bits of floats as numbers.
inline F32 upper24(const uint32_t* words) {
  return _mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_loadu_si512(words), 8));
}
inline F32 bits_as_number(F32 x) { return _mm512_cvtepi32_ps(_mm512_castps_si512(x)); }
inline uint32_t not_less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }

#elif RF_LEVEL == RF_AVX2

inline F32 larger(F32 z, F32 acc) { return _mm256_max_ps(z, acc); }
inline F32 smaller(F32 acc, F32 z) { return _mm256_min_ps(acc, z); }
// Below -125 both take t for -125, where 2^t is still a normal number; NaN stays.
inline F32 fraction(F32 t) {
  t = _mm256_max_ps(_mm256_set1_ps(-125.0f), t);
  return _mm256_sub_ps(t, _mm256_floor_ps(t));
}
inline F32 times_power(F32 p, F32 t) {
  const __m256 n = _mm256_floor_ps(_mm256_max_ps(_mm256_set1_ps(-125.0f), t));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}
inline F32 upper24(const uint32_t* words) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  return _mm256_cvtepi32_ps(_mm256_srli_epi32(w, 8));
}
inline F32 bits_as_number(F32 x) { return _mm256_cvtepi32_ps(_mm256_castps_si256(x)); }
inline uint32_t not_less(F32 a, F32 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
}

#else

inline F32 choose(I32 mask, F32 a, F32 b) {
  return reinterpret_cast<F32>((reinterpret_cast<I32>(a) & mask) |
                               (reinterpret_cast<I32>(b) & ~mask));
}
inline F32 larger(F32 z, F32 acc) { return choose(z > acc, z, acc); }
inline F32 smaller(F32 acc, F32 z) { return choose(acc < z, acc, z); }
inline F32 floor_above_125(F32 t) {  // up to 1 less where t is an integer: 2^1 serves as 2^0
  t = larger(broadcast(-125.0f), t);
  return (t - 0.5f + 0x1.8p23f) - 0x1.8p23f;
}
inline F32 fraction(F32 t) { return larger(broadcast(-125.0f), t) - floor_above_125(t); }
inline F32 times_power(F32 p, F32 t) {
  const I32 n = __builtin_convertvector(floor_above_125(t), I32);
  return reinterpret_cast<F32>(reinterpret_cast<I32>(p) + (n << 23));
}
inline F32 upper24(const uint32_t* words) {
  I32 w;
  std::memcpy(&w, words, sizeof w);
  return __builtin_convertvector(w >> 8 & 0xFFFFFF, F32);
}
inline F32 bits_as_number(F32 x) { return __builtin_convertvector(reinterpret_cast<I32>(x), F32); }
inline uint32_t not_less(F32 a, F32 b) {
  const I32 less = a < b;
  uint32_t mask = 0;
  for (int l = 0; l < kF32; ++l) mask |= static_cast<uint32_t>(less[l] == 0) << l;
  return mask;
}

#endif

// 2^t for t <= 0 within 2^-22: minimax polynomial on [0, 1], 1 at 0. NaN stays NaN; what is below
// 2^-125 comes out as at most that.
inline F32 exp2(F32 t) {
  const F32 f = fraction(t);
  F32 p = broadcast(0x1.e974fap-10f);
  p = fma(p, f, broadcast(0x1.277856p-7f));
  p = fma(p, f, broadcast(0x1.c91ce6p-5f));
  p = fma(p, f, broadcast(0x1.ebdb56p-3f));
  p = fma(p, f, broadcast(0x1.62e4bap-1f));
  p = fma(p, f, broadcast(1.0f));
  return times_power(p, t);
}

inline float max_of_lanes(F32 x) {
  float lanes[kF32];
  store(lanes, x);
  float m = lanes[0];
  for (int l = 1; l < kF32; ++l) m = lanes[l] > m ? lanes[l] : m;
  return m;
}

inline float sum_of_lanes(F32 x) {
  float lanes[kF32];
  store(lanes, x);
  for (int width = kF32 / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}
