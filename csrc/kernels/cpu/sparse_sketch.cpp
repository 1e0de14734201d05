#include "sparse_sketch.h"

#include <algorithm>
#include <vector>

#define RF_IMPL "sparse_sketch_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

namespace {
struct Lists {
  explicit Lists(const SparseOperator& op)
      : rows(std::max(kSketchBatch * op.count * op.nnz, kNumberBatch)), signs(rows.size()) {}
  operator NonzeroList() { return {rows.data(), signs.data()}; }
  std::vector<uint32_t> rows;
  std::vector<float> signs;
};

// A register that straddles two cache lines costs twice.
struct alignas(64) Line {
  char bytes[64];
};
}  // namespace

SketchTiles sketch_tiles(int64_t rows, int64_t cols, const SparseOperator& op,
                         int64_t accumulator_bytes, bool may_be_by_number) {
  constexpr int64_t kCache = 512 << 10, kScratch = 16 << 20, kTasks = 8, kLeastRows = 1024;
  constexpr int64_t kMany = 8, kMostRows = 256;  // 32 KiB of sums
  const int64_t column_bytes = std::max<int64_t>(op.count * op.rows() * accumulator_bytes, 1);
  const int64_t narrow = kNarrowBytes / accumulator_bytes;
  SketchTiles t;
  t.by_number = may_be_by_number && cols > narrow && op.nnz >= kMany && op.d / op.nnz <= kMostRows;
  // Whole cache lines of sums, as many as fit the L2 cache, evened out over the strips.
  const int64_t widest =
      t.by_number ? narrow : std::max<int64_t>(kCache / column_bytes / 16 * 16, 16);
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
  const int64_t rows = args.tiles.by_number ? kNumberBatch : kSketchBatch;
  std::vector<Line> lines(rows * args.tiles.width * sizeof(SumOf<T>) / sizeof(Line) + 1);
  SumOf<T>* const buffer = reinterpret_cast<SumOf<T>*>(lines.data());
  Lists lists(args.op);
  RF_DISPATCH(sparse_sketch<T>)(args, buffer, lists, begin, end);
}
template <class T>
void csr_sketch(const CsrSketchArgs<T>& args, int64_t begin, int64_t end) {
  Lists lists(args.op);
  RF_DISPATCH(csr_sketch<T>)(args, lists, begin, end);
}
template <class Sum>
void sketch_sums(const SketchSumArgs<Sum>& args, int64_t begin, int64_t end) {
  RF_DISPATCH(sketch_sums<Sum>)(args, begin, end);
}
template <class Sum>
void sparse_sketch_adjoint(const SparseAdjointArgs<Sum>& args, int64_t begin, int64_t end) {
  Lists lists(args.op);
  RF_DISPATCH(sparse_sketch_adjoint<Sum>)(args, lists, begin, end);
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
