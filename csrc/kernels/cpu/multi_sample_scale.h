// y = x * count * scale, where count is how many of M dropout masks keep the element: the mean of M
// masked copies in law, from one 32-bit lane an element; 0 where the count is.
//
// Bytes: one read and one write per element. One Philox4x32-10 call decides 4 elements (3 times the
// multiplications of a 16-bit mask), and the count takes one comparison per threshold. y may be x.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/streams.h"

namespace randfuse::cpu {

// The table of `count_table` for 32-bit comparisons: the thresholds in [1, 2^32), and how many are
// 0, which every lane reaches; no lane reaches 2^32.
struct CountRule {
  uint32_t threshold[kMaxCount];
  int thresholds;
  uint32_t always;
  double scale;
};

CountRule count_rule(uint32_t drop_threshold, int samples);

template <class T>
struct MultiSampleScaleArgs {
  const T* x;  // (rows, cols)
  T* y;        // (rows, cols), row-major
  int64_t cols;
  int64_t x_stride;  // elements between rows of x
  MaskStream stream;
  CountRule rule;
};

template <class T>  // float, double, half_t, bfloat16_t; ranges as those of dropout (mask_groups)
void multi_sample_scale(const MultiSampleScaleArgs<T>& args, int64_t group_begin,
                        int64_t group_end);

}  // namespace randfuse::cpu
