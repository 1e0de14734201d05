namespace randfuse::RF_ISA {
#include "simd.h"
// mask_rows.h builds on simd.h
#include "mask_rows.h"

// Counts of the 64 columns of a group; plain loops, which the compiler's vectoriser takes.
inline void count_group(const Row& row, uint64_t first_column, const cpu::CountRule& rule,
                        uint32_t* count) {
  alignas(64) uint32_t words[kGroup];
  const uint32_t j0 = static_cast<uint32_t>(first_column / 4);
  words32(row, j0, words);
  words32(row, j0 + 8, words + 32);
  for (int l = 0; l < kGroup; ++l) count[l] = rule.always;
  for (int k = 0; k < rule.thresholds; ++k) {
    const uint32_t threshold = rule.threshold[k];
    for (int l = 0; l < kGroup; ++l) count[l] += words[l] >= threshold ? 1 : 0;
  }
}

template <class T>
inline void scale_group(const uint32_t* count, double scale, const T* in, T* out) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  alignas(64) Sum value[kGroup];
  if constexpr (std::is_same_v<T, double>) {
    std::memcpy(value, in, sizeof value);
  } else {
    for (int v = 0; v < kGroup; v += kF32) store(value + v, load(in + v));
  }
  const Sum factor = static_cast<Sum>(scale);
  for (int l = 0; l < kGroup; ++l) {
    const Sum scaled = value[l] * (static_cast<Sum>(static_cast<int32_t>(count[l])) * factor);
    value[l] = count[l] > 0 ? scaled : Sum{0};
  }
  if constexpr (std::is_same_v<T, double>) {
    std::memcpy(out, value, sizeof value);
  } else {
    for (int v = 0; v < kGroup; v += kF32) store(out + v, load(value + v));
  }
}

template <class T>
void multi_sample_scale(const cpu::MultiSampleScaleArgs<T>& a, int64_t begin, int64_t end) {
  int64_t current = -1;
  Row row{};
  walk_groups(a.cols, a.stream.col_offset, begin, end, [&](int64_t r, int64_t g, const Span& s) {
    if (r != current) {
      row = stream_row(a.stream, r);
      current = r;
    }
    alignas(64) uint32_t count[kGroup];
    count_group(row, (a.stream.col_offset / kGroup + g) * kGroup, a.rule, count);
    const int64_t c = s.start + s.skip;
    on_group(a.x + r * a.x_stride + c, a.y + r * a.cols + c, s.skip, s.n,
             [&](const T* in, T* out) { scale_group(count, a.rule.scale, in, out); });
  });
}

}  // namespace randfuse::RF_ISA
