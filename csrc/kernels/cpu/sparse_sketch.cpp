#include "sparse_sketch.h"

#include <algorithm>
#include <vector>

#define RF_IMPL "sparse_sketch_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

static std::vector<Nonzero> run_buffer(const SparseOperator& op) {
  return std::vector<Nonzero>(kSketchBatch * op.count * op.nnz);
}

SketchTiles sketch_tiles(int64_t rows, int64_t cols, int64_t out_rows, int64_t accumulator_bytes) {
  constexpr int64_t kCache = 512 << 10, kScratch = 16 << 20, kTasks = 8, kLeastRows = 1024;
  const int64_t column_bytes = std::max<int64_t>(out_rows * accumulator_bytes, 1);
  // Whole cache lines of sums, as many as fit the L2 cache, evened out over the strips.
  const int64_t widest = std::max<int64_t>(kCache / column_bytes / 16 * 16, 16);
  SketchTiles t;
  t.strips = std::max<int64_t>((cols + widest - 1) / widest, 1);
  t.width = (cols + t.strips - 1) / t.strips;
  if (t.strips > 1) t.width = (t.width + 15) / 16 * 16;
  t.strips = std::max<int64_t>((cols + t.width - 1) / std::max<int64_t>(t.width, 1), 1);
  t.chunks = std::min({(kTasks + t.strips - 1) / t.strips, rows / kLeastRows,
                       kScratch / (column_bytes * std::max<int64_t>(cols, 1))});
  t.chunks = std::max<int64_t>(t.chunks, 1);
  t.chunk_rows = (rows + t.chunks - 1) / t.chunks;
  t.chunk_rows = (t.chunk_rows + kSketchBatch - 1) / kSketchBatch * kSketchBatch;
  t.chunks = std::max<int64_t>((rows + t.chunk_rows - 1) / std::max<int64_t>(t.chunk_rows, 1), 1);
  return t;
}

template <class T>
void sparse_sketch(const SparseSketchArgs<T>& args, int64_t begin, int64_t end) {
  std::vector<SumOf<T>> buffer(kSketchBatch * args.tiles.width);
  auto entries = run_buffer(args.op);
  RF_DISPATCH(sparse_sketch<T>)(args, buffer.data(), entries.data(), begin, end);
}
template <class T>
void csr_sketch(const CsrSketchArgs<T>& args, int64_t begin, int64_t end) {
  auto entries = run_buffer(args.op);
  RF_DISPATCH(csr_sketch<T>)(args, entries.data(), begin, end);
}
template <class Sum>
void sketch_sums(const SketchSumArgs<Sum>& args, int64_t begin, int64_t end) {
  RF_DISPATCH(sketch_sums<Sum>)(args, begin, end);
}
template <class Sum>
void sparse_sketch_adjoint(const SparseAdjointArgs<Sum>& args, int64_t begin, int64_t end) {
  auto entries = run_buffer(args.op);
  RF_DISPATCH(sparse_sketch_adjoint<Sum>)(args, entries.data(), begin, end);
}
void sparse_sketch_entries(const SparseEntriesArgs& args, int64_t begin, int64_t end) {
  RF_DISPATCH(sparse_sketch_entries)(args, begin, end);
}

#define RF_INSTANTIATE(T)                                                    \
  template void sparse_sketch(const SparseSketchArgs<T>&, int64_t, int64_t); \
  template void csr_sketch(const CsrSketchArgs<T>&, int64_t, int64_t);
RF_INSTANTIATE(float)
RF_INSTANTIATE(half_t)
RF_INSTANTIATE(bfloat16_t)
RF_INSTANTIATE(double)
#undef RF_INSTANTIATE
template void sketch_sums(const SketchSumArgs<float>&, int64_t, int64_t);
template void sketch_sums(const SketchSumArgs<double>&, int64_t, int64_t);
template void sparse_sketch_adjoint(const SparseAdjointArgs<float>&, int64_t, int64_t);
template void sparse_sketch_adjoint(const SparseAdjointArgs<double>&, int64_t, int64_t);

}  // namespace randfuse::cpu
