namespace randfuse::RF_ISA {
#include "simd.h"

#if RF_LEVEL == RF_AVX512
inline F32 square_root(F32 x) { return _mm512_sqrt_ps(x); }
#elif RF_LEVEL == RF_AVX2
inline F32 square_root(F32 x) { return _mm256_sqrt_ps(x); }
#else
inline F32 square_root(F32 x) {
  for (int l = 0; l < kF32; ++l) x[l] = std::sqrt(x[l]);
  return x;
}
#endif

// 32 normals from 32 words: words l and l + 16 give normals l (cosine) and l + 16 (sine), so that
// registers of words need no shuffling.
struct Normals {
  static constexpr int kGroup = 32;
  static constexpr uint32_t kDomain = domain_word(static_cast<uint32_t>(Op::kSketchNormal), 5);

  static void draw(const Row& row, uint32_t j, float* out) {
    alignas(64) uint32_t words[kGroup];
    alignas(64) float radius[16];
    words32(row, j, words);
    for (int l = 0; l < 16; ++l) radius[l] = minus_two_log(words[l]);
    for (int l = 0; l < 16; l += kF32) store(radius + l, square_root(load(radius + l)));
    for (int l = 0; l < 16; ++l) {
      const Turn t = turn(words[16 + l]);
      out[l] = radius[l] * t.cosine;
      out[16 + l] = radius[l] * t.sine;
    }
  }
};

// 1 where the bit of a column is 0, -1 where it is 1.
inline void signs(const Words& w, float* out) {
  for (int r = 0; r < 4; ++r) {
    for (int l = 0; l < 32; ++l) {
      const uint32_t bits = 0x3F800000u | w.r[r] >> l << 31;
      std::memcpy(out + 32 * r + l, &bits, sizeof bits);
    }
  }
}

// fill(number, out): `group` entries from column group * number on. Whole groups go straight to
// `out`.
template <class Fill>
inline void fill_row(float* out, int64_t begin, int64_t cols, int64_t group, Fill&& fill) {
  alignas(64) float buffer[128];
  for (int64_t at = 0; at < cols;) {
    const int64_t number = (begin + at) / group, skip = (begin + at) % group;
    const int64_t left = group - skip, n = left < cols - at ? left : cols - at;
    if (n == group) {
      fill(number, out + at);
    } else {
      fill(number, buffer);
      std::memcpy(out + at, buffer + skip, static_cast<size_t>(n) * sizeof(float));
    }
    at += n;
  }
}

inline void dense_sketch_entries(const cpu::DenseEntriesArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const uint32_t s = static_cast<uint32_t>(a.row_begin + r);
    float* out = a.out + r * a.cols;
    if (a.family == cpu::Family::kRademacher) {
      constexpr uint32_t kDomain = domain_word(static_cast<uint32_t>(Op::kSketchSign), 0);
      fill_row(out, a.col_begin, a.cols, 128, [&](int64_t number, float* to) {
        signs(long_block<kMaskRounds>(a.key, static_cast<uint64_t>(number), s, kDomain), to);
      });
      continue;
    }
    uint32_t high = 0;  // the half of the block number that a Row fixes
    Row row = row_of(a.key, high, s, Normals::kDomain);
    fill_row(out, a.col_begin, a.cols, Normals::kGroup, [&](int64_t number, float* to) {
      const uint64_t block = static_cast<uint64_t>(number) * (Normals::kGroup / 4);
      if (static_cast<uint32_t>(block >> 32) != high) {
        high = static_cast<uint32_t>(block >> 32);
        row = row_of(a.key, high, s, Normals::kDomain);
      }
      Normals::draw(row, static_cast<uint32_t>(block), to);
    });
  }
}

}  // namespace randfuse::RF_ISA
