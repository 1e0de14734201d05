// Y_k = S_k A, X = sum_k S_k^T Y_k and the nonzeros of K sparse operators (CountSketch, SJLT) that
// are never stored; A is float, half_t or bfloat16_t, sums are float. Asynchronous.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>

#include "../common/dtype.h"
#include "../common/sketch.h"

namespace randfuse::cuda {

inline constexpr int kSketchRows = 512;   // of A in a batch
inline constexpr int kSketchCols = 32;    // of A in a strip
inline constexpr int kSketchBins = 1024;  // rows of all Y_k in a tile

// The cut of a sketch is a function of its shape alone, so that no bit depends on the GPU. Batches
// are counted from the stream's block of four columns that row 0 of A lies in.
struct SketchCut {
  int64_t strips, tiles, chunks, chunk_batches, batches;
  SketchCut(int64_t rows, int64_t cols, const SparseOperator& op) {
    constexpr int64_t kBlocks = 128, kLeastRows = 2048;  // a large GPU's multiprocessors
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    strips = ceil_div(cols, kSketchCols);
    tiles = ceil_div(op.count * op.rows(), kSketchBins);
    batches = ceil_div(op.col_offset % 4 + rows, kSketchRows);
    const int64_t most = std::max<int64_t>(rows / kLeastRows, 1);
    chunks = std::min(most, ceil_div(kBlocks, std::max<int64_t>(strips * tiles, 1)));
    chunk_batches = ceil_div(std::max<int64_t>(batches, 1), chunks);
    chunks = ceil_div(std::max<int64_t>(batches, 1), chunk_batches);
  }
};

template <class T>
struct SparseSketchArgs {
  const T* a;  // (rows, cols)
  int64_t rows, cols, row_stride, col_stride;
  SparseOperator op;  // its keys are on the device
  float* y;           // (count, rows of op, cols)
  float* sums;        // (chunks, count, rows of op, cols); may be null where there is one chunk
  float scale;
};

struct SparseAdjointArgs {
  const float* y;  // (count, rows of op, cols)
  float* x;        // (rows, cols)
  int64_t rows, cols;
  SparseOperator op;
  float scale;
};

struct SparseEntriesArgs {
  int64_t* rows;  // (count, nnz, cols)
  int8_t* signs;
  int64_t cols;
  SparseOperator op;
};

template <class T>
cudaError_t launch_sparse_sketch(const SparseSketchArgs<T>& args, cudaStream_t stream);
cudaError_t launch_sparse_sketch_adjoint(const SparseAdjointArgs& args, cudaStream_t stream);
cudaError_t launch_sparse_sketch_entries(const SparseEntriesArgs& args, cudaStream_t stream);

}  // namespace randfuse::cuda
