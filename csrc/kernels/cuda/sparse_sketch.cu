#include "sparse_sketch.cuh"

namespace randfuse::cuda {

template <class T>
cudaError_t launch_sparse_sketch(const SparseSketchArgs<T>& a, cudaStream_t stream) {
  const int64_t count = a.op.count * a.op.rows() * a.cols;
  if (count == 0) return cudaSuccess;
  const SketchCut cut(a.rows, a.cols, a.op);
  if (cut.chunks > 1 && a.sums == nullptr) return cudaErrorInvalidValue;
  const int64_t lanes = 16 / sizeof(T);
  const bool pieces = a.col_stride == 1 && a.row_stride % lanes == 0 && a.cols % lanes == 0 &&
                      reinterpret_cast<uintptr_t>(a.a) % 16 == 0;
  const int64_t blocks = cut.chunks * cut.strips * cut.tiles;
  const cudaError_t status = pieces ? launch(sparse_sketch_kernel<T, true>, blocks, kSketchThreads,
                                             sketch_shared<T, true>(), stream, a, cut)
                                    : launch(sparse_sketch_kernel<T, false>, blocks, kSketchThreads,
                                             sketch_shared<T, false>(), stream, a, cut);
  if (status != cudaSuccess || cut.chunks == 1) return status;
  const int64_t most = int64_t{1} << 16;  // the rest by strides of the grid
  return launch(sketch_sums_kernel, std::min(ceil_div(count, kThreads), most), kThreads, 0, stream,
                static_cast<const float*>(a.sums), a.y, count, cut.chunks, a.scale);
}

cudaError_t launch_sparse_sketch_adjoint(const SparseAdjointArgs& a, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  const int64_t strips = ceil_div(a.cols, kAdjointCols);
  const int64_t batches = ceil_div(a.op.col_offset % 4 + a.rows, kAdjointRows);
  return launch(sparse_sketch_adjoint_kernel, batches * strips, kThreads,
                kAdjointGroup * kAdjointRows * sizeof(AdjointNonzero), stream, a, strips);
}

cudaError_t launch_sparse_sketch_entries(const SparseEntriesArgs& a, cudaStream_t stream) {
  if (a.cols == 0) return cudaSuccess;
  const int64_t quads = ceil_div(a.op.col_offset % 4 + a.cols, 4);
  const int64_t blocks = ceil_div(a.op.count * a.op.nnz * quads, kThreads);
  return launch(sparse_sketch_entries_kernel, blocks, kThreads, 0, stream, a, quads);
}

template cudaError_t launch_sparse_sketch(const SparseSketchArgs<float>&, cudaStream_t);
template cudaError_t launch_sparse_sketch(const SparseSketchArgs<half_t>&, cudaStream_t);
template cudaError_t launch_sparse_sketch(const SparseSketchArgs<bfloat16_t>&, cudaStream_t);

}  // namespace randfuse::cuda
