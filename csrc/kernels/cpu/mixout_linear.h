// y = a + D(w - a): a weight w mixed with its anchor a, element by element.
//
// Bytes: two reads and one write an element (6NK of bf16), against six passes of the eager formula.
// The product with the mixed weight is the library's: for M rows this pass is 1/M of its work.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/streams.h"

namespace randfuse::cpu {

template <class T>
struct MixoutArgs {
  const T *weight, *anchor;  // (rows, cols)
  T* y;                      // (rows, cols), row-major
  int64_t cols;
  int64_t weight_stride, anchor_stride;  // elements between rows
  MaskStream stream;
  Rate rate;
};

// Ranges are over the 64-column groups of the matrix, as in dropout.h.
template <class T>  // float, double, half_t, bfloat16_t
void mixout(const MixoutArgs<T>& args, int64_t group_begin, int64_t group_end);

}  // namespace randfuse::cpu
