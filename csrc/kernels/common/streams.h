// Random streams, version 1: which counter a decision reads. Normative text: docs/streams.md.
//   block(K; i, j, s, D) = Philox4x32-R(counter = (j, i, s, D), key = (lo K, hi K))
//   lane (K; i, c, s)    = bits [w*(c mod L), w*(c mod L)+w) of block(j = c div L),  L = 128 / w
#pragma once
#include <cmath>

#include "philox.h"

namespace randfuse {

// A number never changes its meaning; a new op takes the next free one.
enum class Op : uint32_t {
  kFoldIn = 0,
  kDropout = 1,        // input of a layer; sample m of a multi-sample head is sub-stream m
  kOutputDropout = 2,  // output of a layer
  kWeightMask = 3,
  kStructured = 4,
  kMultiSampleCount = 6,
  kCategorical = 8,
  kRaceHigh = 9,
  kAcceptCoin = 10,
  kResidual = 11,
  kUnmaskCoin = 12,
  kRemaskCoin = 13,
  kSelectionNoise = 14,
  kFirstHittingClock = 15,
  kSketchSign = 16,
  kSketchIndex = 17,
  kSketchNormal = 18,
  kSketchPermutation = 19,
  kRowSampling = 20,
  kRaceLow = 21,
  kEmbeddingRow = 22,
};

inline constexpr uint32_t kStreamVersion = 1;
inline constexpr int kMaskRounds = 7;   // lanes of at most 16 bits
inline constexpr int kWordRounds = 10;  // everything else
inline constexpr int kMaskLanes = 8;    // 16-bit lanes in one block
inline constexpr uint32_t kDropAll = 65536;

// log2_width: 0 for 1-bit lanes ... 5 for 32-bit words, 6 for 64-bit words.
RF_HD constexpr uint32_t domain_word(uint32_t op, uint32_t log2_width) {
  return kStreamVersion << 24 | op << 8 | log2_width;
}

// `domain` of the 16-bit decisions of an op.
RF_HD constexpr uint32_t mask_domain(uint32_t op) { return domain_word(op, 4); }

template <int kRounds>
RF_HD Words block(uint64_t key, uint32_t i, uint32_t j, uint32_t s, uint32_t domain) {
  return philox4x32<kRounds>(j, i, s, domain, static_cast<uint32_t>(key),
                             static_cast<uint32_t>(key >> 32));
}

// The 16-bit lane `c mod 8` of a block: words hold column pairs, low half first.
RF_HD uint32_t lane16(const Words& b, uint32_t c) {
  return b.r[(c & 7u) >> 1] >> ((c & 1u) * 16u) & 0xFFFFu;
}

// The lane of column c for widths up to 32 bits.
RF_HD uint32_t lane(const Words& b, uint64_t c, uint32_t log2_width) {
  const uint32_t bit = static_cast<uint32_t>(c << log2_width) & 127u, width = 1u << log2_width;
  return b.r[bit >> 5] >> (bit & 31u) & (0xFFFFFFFFu >> (32u - width));
}

// A word of a 16-bit block decides two neighbouring columns: 0xFFFF where the column is kept, the
// mask to AND with a pair of 16-bit values.
RF_HD uint32_t keep_pair(uint32_t word, uint32_t threshold) {
  return ((word & 0xFFFFu) >= threshold ? 0x0000FFFFu : 0u) |
         ((word >> 16) >= threshold ? 0xFFFF0000u : 0u);
}

RF_HD uint64_t fold_in(uint64_t key, uint64_t data) {
  const Words b = philox4x32<kWordRounds>(
      static_cast<uint32_t>(data), static_cast<uint32_t>(data >> 32), 0u, 0x01000007u,
      static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  return static_cast<uint64_t>(b.r[1]) << 32 | b.r[0];
}

// Probability as it is really used: drop iff lane < threshold, kept values times scale.
struct Rate {
  uint32_t threshold;  // 0 ... 65536
  double scale;        // 65536 / (65536 - threshold); 0 when everything is dropped
};

// Out-of-range p (a device tensor cannot raise) is clamped and NaN counts as 0.
RF_HD Rate drop_rate(double p) {
  const double clamped = p > 0.0 ? (p < 1.0 ? p : 1.0) : 0.0;
  const uint32_t t = static_cast<uint32_t>(rint(clamped * 65536.0));  // half to even
  return {t, t < kDropAll ? 65536.0 / (65536.0 - t) : 0.0};
}

// Most samples that the mean of masks counts; table of `count_table`: one entry more.
inline constexpr int kMaxCount = 128;

// Of `samples` masks with threshold t, k keep an element where its 32-bit lane reaches k of the
// thresholds table[0 ... samples): P(fewer than k keep) at 2^-32, by `samples` steps of integers
// with 46 binary places. Where nothing is dropped one mask counts, not all: the scale is 1, and
// `samples` times the float32 of one over `samples` need not be. Returns one over the mean count of
// the table as it stands.
RF_HD double count_table(uint32_t t, int samples, uint64_t* table) {
  table[0] = uint64_t{1} << 46;  // mass of 0, 1 ... kept masks
  for (int m = 0; m < samples; ++m) {
    table[m + 1] = 0;
    for (int j = m + 1; j >= 0; --j) {
      const uint64_t one_less = j > 0 ? table[j - 1] : 0;
      table[j] = (table[j] * t + one_less * (kDropAll - t) + (1u << 15)) >> 16;
    }
  }
  uint64_t below = 0, mean = 0;  // mean count at 2^-32
  for (int k = 0; k < samples; ++k) {
    below += table[k];
    table[k] = t == 0 && k > 0 ? uint64_t{1} << 32 : (below + (1u << 13)) >> 14;
    mean += (uint64_t{1} << 32) - table[k];
  }
  return mean > 0 ? 4294967296.0 / static_cast<double>(mean) : 0.0;
}

// Where in a stream a (rows, cols) matrix of 16-bit decisions lies.
// Row r reads key r div rows_per_key as row i = row_offset + r mod rows_per_key.
struct MaskStream {
  const int64_t* keys;   // (G,)
  int64_t rows_per_key;  // rows / G
  int64_t row_offset, col_offset;
  uint32_t sample, domain;
};

}  // namespace randfuse
