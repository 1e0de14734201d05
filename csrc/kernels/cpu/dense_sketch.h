// Entries of the dense operators, Gaussian and Rademacher, unscaled (mean 0, variance 1), by tiles.
//
// A product generates a tile of S, multiplies it by the library and forgets it: no byte of S reaches
// memory. A normal costs 1/4 of a Philox4x32-10 call and half a Box-Muller pair, a sign 1/128 of a
// Philox4x32-7 call; each entry then serves n columns of data, so signs are free and normals are
// from n of some 50 on.
#pragma once
#include <cstdint>

#include "../common/sketch.h"

namespace randfuse::cpu {

enum class Family { kGaussian, kRademacher };

inline constexpr int64_t kTileRows = 64, kTileCols = 1024;  // 256 KiB of floats a thread

struct DenseEntriesArgs {
  float* out;  // (rows, cols), row-major
  int64_t rows, cols;
  Family family;
  uint64_t key;
  int64_t row_begin, col_begin;  // place in the operator
};

void dense_sketch_entries(const DenseEntriesArgs& args, int64_t row_begin, int64_t row_end);

}  // namespace randfuse::cpu
