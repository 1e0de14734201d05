// Entries of the dense operators, Gaussian and Rademacher, unscaled (mean 0, variance 1), by tiles.
//
// A product generates a tile of S, multiplies it and forgets it: no byte of S reaches memory. A
// normal costs 1/4 of a Philox4x32-10 call and half a Box-Muller pair, a sign 1/128 of a
// Philox4x32-7 call; each entry then serves n columns of data, so signs are free and normals are
// from n of some 50 on. The multiplication is our own because the library's bits depend on threads:
// panels of data are packed (any strides and dtype) and each result is one chain of fma in the
// order of the index that is summed over, so no bit depends on threads or on AVX2 against AVX-512.
#pragma once
#include <cstdint>

#include "../common/sketch.h"

namespace randfuse::cpu {

enum class Family { kGaussian, kRademacher };

inline constexpr int64_t kTileRows = 64, kTileCols = 512;  // 128 KiB of floats a thread
inline constexpr int64_t kPanelBytes = 192;                // three of the widest registers

struct DenseEntriesArgs {
  float* out;  // (rows, cols), row-major
  int64_t rows, cols;
  Family family;
  uint64_t key;
  int64_t row_begin, col_begin;  // place in the operator
};

// Rows [row_begin, row_end) and columns from col_offset on of `count` operators.
struct DenseOperator {
  const int64_t* keys;
  int64_t count, row_begin, row_end, col_offset;
  Family family;
  int64_t rows() const { return row_end - row_begin; }
};

template <class T>
struct DenseSketchArgs {
  const T* in;      // (cols, n) of any strides, or (count, rows, n) contiguous for the adjoint
  SumOf<T>* out;    // (count, rows, n) or (cols, n), zeroed
  int64_t cols, n;  // cols: of the operator
  int64_t row_stride, col_stride;  // of in
  int64_t step;                    // rows of out in a task, at most kTileRows (kTileCols)
  SumOf<T> scale;
  DenseOperator op;
  int64_t tasks() const { return op.count * ((op.rows() + step - 1) / step); }
  int64_t adjoint_tasks() const { return (cols + step - 1) / step; }
};

template <class T>
void dense_sketch(const DenseSketchArgs<T>& args, int64_t task_begin, int64_t task_end);
template <class Sum>
void dense_sketch_adjoint(const DenseSketchArgs<Sum>& args, int64_t task_begin, int64_t task_end);
void dense_sketch_entries(const DenseEntriesArgs& args, int64_t row_begin, int64_t row_end);

}  // namespace randfuse::cpu
