// Y_k = S_k A and X = sum_k S_k^T Y_k for K sparse operators S_k (CountSketch, SJLT) that are never
// stored.
//
// Bytes: A is read once and Y written once. Each element of A costs nnz additions, each nonzero of
// S 1/4 of a Philox4x32-10 call, which all columns of A share. Rows of Y are scattered to, so Y is
// held in the L2 cache: A is cut into strips of columns for which the accumulators fit, and, where
// that gives too few tasks, into chunks of rows whose sums are added in order. The cut is a
// function of the shape alone: no bit depends on the number of threads or the instruction set.
//
// An addition moves a cache line from L2 and back, some 8 clocks. That hides behind the read of A
// while nonzeros are few. Where they are many, a task takes them by their number t instead: those
// of all columns lie in the same d / nnz rows, whose sums stay in L1 for a narrow strip, while a
// batch of A comes from L2 once for each t. A sum gets its terms in the same order.
//
// The adjoint gathers rows of Y and has no conflicts.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/sketch.h"

namespace randfuse::cpu {

struct NonzeroList {
  uint32_t* rows;  // of the block; not below its rows(): outside
  float* signs;
};

struct SketchTiles {
  int64_t width, strips;       // columns of A in a strip
  int64_t chunk_rows, chunks;  // rows of A in a chunk
  bool by_number;              // of nonzeros; strips are then kNarrowBytes wide
  int64_t count() const { return strips * chunks; }
};

// rows x cols are those of A, which is dense if its nonzeros may be taken by number.
SketchTiles sketch_tiles(int64_t rows, int64_t cols, const SparseOperator& op,
                         int64_t accumulator_bytes, bool may_be_by_number);

template <class T>
struct SparseSketchArgs {
  const T* a;  // (rows, cols)
  int64_t rows, cols, row_stride, col_stride;
  SparseOperator op;
  SketchTiles tiles;
  SumOf<T>* sums;  // (chunks, strips, out_rows, width)
};

template <class T>
struct CsrSketchArgs {
  const int64_t *crow, *col;  // columns ascend within a row
  const T* values;
  int64_t rows, cols;
  SparseOperator op;
  SketchTiles tiles;
  SumOf<T>* sums;
};

template <class Sum>
struct SketchSumArgs {  // y = scale * sum over chunks
  const Sum* sums;
  Sum* y;  // (out_rows, cols)
  int64_t cols, out_rows;
  SketchTiles tiles;
  Sum scale;
};

template <class Sum>
struct SparseAdjointArgs {
  const Sum* y;  // (count, rows of op, cols)
  Sum* x;        // (rows, cols)
  int64_t rows, cols;
  SparseOperator op;
  Sum scale;
};

struct SparseEntriesArgs {
  int64_t* rows;  // (count, nnz, cols)
  int8_t* signs;
  int64_t cols;
  SparseOperator op;
};

inline constexpr int64_t kSketchBatch = 128;  // columns of S drawn at a time
inline constexpr int64_t kNumberBatch = 512;  // rows of A in a batch that is walked by number
inline constexpr int64_t kNarrowBytes = 128;  // of the sums in a row of its strips

template <class T>
void sparse_sketch(const SparseSketchArgs<T>& args, int64_t tile_begin, int64_t tile_end);
template <class T>
void csr_sketch(const CsrSketchArgs<T>& args, int64_t tile_begin, int64_t tile_end);
template <class Sum>
void sketch_sums(const SketchSumArgs<Sum>& args, int64_t row_begin, int64_t row_end);
template <class Sum>
void sparse_sketch_adjoint(const SparseAdjointArgs<Sum>& args, int64_t row_begin, int64_t row_end);
void sparse_sketch_entries(const SparseEntriesArgs& args, int64_t col_begin, int64_t col_end);

}  // namespace randfuse::cpu
