// y = x * scale where the stream's lane is not below the threshold, else 0; and the mask alone.
//
// Bytes: one read and one write per element. One Philox4x32-7 call decides 8 elements, 8 calls
// share a register, so the arithmetic is ~0.2 ns an element on one AVX-512 core: below the memory's
// pace. y may be x. Bits of y depend on nothing but (x, stream, rate).
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/streams.h"

namespace randfuse::cpu {

template <class T>
struct DropoutArgs {
  const T* x;  // (rows, cols)
  T* y;        // (rows, cols), row-major
  int64_t cols;
  int64_t x_stride;  // elements between rows of x
  MaskStream stream;
  Rate rate;
};

struct DropoutMaskArgs {
  bool* mask;  // (rows, cols), row-major; true = kept
  int64_t cols;
  MaskStream stream;
  Rate rate;
};

// Number of 64-column groups of a matrix: the unit of the ranges below.
int64_t mask_groups(int64_t rows, int64_t cols, int64_t col_offset);

template <class T>  // float, double, half_t, bfloat16_t
void dropout(const DropoutArgs<T>& args, int64_t group_begin, int64_t group_end);
void dropout_mask(const DropoutMaskArgs& args, int64_t group_begin, int64_t group_end);

}  // namespace randfuse::cpu
