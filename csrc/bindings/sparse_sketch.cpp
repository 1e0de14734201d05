// sparse_sketch (CountSketch and SJLT, dense and CSR input), its adjoint and its entries.
#include "../kernels/cpu/sparse_sketch.h"

#include <torch/library.h>

#include <tuple>

#include "sketch.h"

#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/sparse_sketch.h"
#include "cuda.h"
#endif

namespace randfuse {
namespace {

constexpr int64_t kMaxNonzeros = 1024;

void check_nonzeros(const char* op, int64_t nnz, int64_t d) {
  TORCH_CHECK_VALUE(1 <= nnz && nnz <= std::min(d, kMaxNonzeros), op,
                    ": nnz must be in [1, min(d, 1024)], got ", nnz);
}

double scale_of(int64_t nnz) { return 1 / std::sqrt(static_cast<double>(nnz)); }

// Runs the tiles of a sketch, then adds up their sums: y (K, rows, cols).
template <class Sum, class Args, class Run>
Tensor run_tiles(Args args, bool is_dense, const at::TensorOptions& options, const Run& run) {
  const int64_t out_rows = args.op.count * args.op.rows();
  const Tensor y = at::empty({args.op.count, args.op.rows(), args.cols}, options);
  if (y.numel() == 0) return y;
  args.tiles = cpu::sketch_tiles(args.rows, args.cols, args.op, sizeof(Sum), is_dense);
  const Tensor sums = at::empty({args.tiles.count(), out_rows, args.tiles.width}, options);
  args.sums = out<Sum>(sums);
  parallel_groups(
      args.tiles.count(), [&](int64_t begin, int64_t end) { run(args, begin, end); }, 1);
  const auto scale = static_cast<Sum>(scale_of(args.op.nnz));
  const cpu::SketchSumArgs<Sum> last{in<Sum>(sums), out<Sum>(y), args.cols,
                                     out_rows,      args.tiles,  scale};
  parallel_groups(
      out_rows, [&](int64_t begin, int64_t end) { cpu::sketch_sums<Sum>(last, begin, end); },
      std::max<int64_t>(1, (int64_t{1} << 15) / (args.cols * args.tiles.chunks)));
  return y;
}

// a (m, n) and the operators' block. Returns the keys, contiguous.
Tensor check_sparse_sketch(const Tensor& a, const Tensor& key, int64_t d, int64_t nnz,
                           int64_t row_begin, int64_t row_end, int64_t col_offset) {
  constexpr const char* op = "sparse_sketch";
  check_float(op, "a", a);
  TORCH_CHECK_VALUE(a.dim() == 2, op, ": a must have shape (m, n), got ", a.sizes());
  const Tensor keys =
      check_sketch(op, key, a.device(), d, row_begin, row_end, col_offset, a.size(0));
  check_nonzeros(op, nnz, d);
  return keys;
}

Tensor sparse_sketch_cpu(const Tensor& a, const Tensor& key, int64_t d, int64_t nnz,
                         int64_t row_begin, int64_t row_end, int64_t col_offset) {
  const Tensor keys = check_sparse_sketch(a, key, d, nnz, row_begin, row_end, col_offset);
  Tensor y;
  dispatch_float(a, [&](auto type) {
    using T = decltype(type);
    using Sum = SumOf<T>;
    cpu::SparseSketchArgs<T> args{};
    args.a = in<T>(a);
    args.rows = a.size(0), args.cols = a.size(1);
    args.row_stride = a.stride(0), args.col_stride = a.stride(1);
    args.op = {in<int64_t>(keys), keys.numel(), d, nnz, row_begin, row_end, col_offset};
    y = run_tiles<Sum>(args, true, a.options().dtype(sum_dtype(a)),
                       [](const auto& tiled, int64_t begin, int64_t end) {
                         cpu::sparse_sketch<T>(tiled, begin, end);
                       });
  });
  return y;
}

// The kernel follows crow and col wherever they point, so they are read and checked first.
void check_csr(const Tensor& crow, const Tensor& col, const Tensor& values, int64_t cols) {
  constexpr const char* op = "csr_sketch";
  check_float(op, "values", values);
  for (const auto& [name, x] :
       {std::pair<const char*, const Tensor&>{"crow", crow}, {"col", col}}) {
    TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, op, ": ", name, " must be int64, got ",
                     dtype_name(x));
    TORCH_CHECK_VALUE(x.device() == values.device(), op, ": ", name, " must be on ",
                      values.device(), ", got ", x.device());
  }
  TORCH_CHECK_VALUE(values.dim() == 1 && col.sizes() == values.sizes(), op,
                    ": col must have the shape (nonzeros,) of values ", values.sizes(), ", got ",
                    col.sizes());
  TORCH_CHECK_VALUE(crow.dim() == 1 && crow.numel() > 0, op,
                    ": crow must have shape (m + 1,), got ", crow.sizes());
  TORCH_CHECK_VALUE(cols >= 0, op, ": cols must be at least 0, got ", cols);
  const int64_t *start = in<int64_t>(crow), *column = in<int64_t>(col), rows = crow.numel() - 1;
  bool ascending = start[0] == 0 && start[rows] == values.numel(), inside = true;
  for (int64_t r = 0; ascending && r < rows; ++r) ascending = start[r] <= start[r + 1];
  TORCH_CHECK_VALUE(ascending, op, ": crow must ascend from 0 to the number of values, ",
                    values.numel(), ", got another");
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t p = start[r]; p < start[r + 1]; ++p) {
      inside &= 0 <= column[p] && column[p] < cols && (p == start[r] || column[p - 1] < column[p]);
    }
  }
  TORCH_CHECK_VALUE(inside, op, ": col must ascend within a row and lie in [0, ", cols,
                    "), got another");
}

Tensor csr_sketch_cpu(const Tensor& values, const Tensor& crow, const Tensor& col, int64_t cols,
                      const Tensor& key, int64_t d, int64_t nnz, int64_t row_begin, int64_t row_end,
                      int64_t col_offset) {
  constexpr const char* op = "csr_sketch";
  const Tensor starts = crow.contiguous(), columns = col.contiguous(), v = values.contiguous();
  check_csr(starts, columns, v, cols);
  const Tensor keys =
      check_sketch(op, key, v.device(), d, row_begin, row_end, col_offset, starts.numel() - 1);
  check_nonzeros(op, nnz, d);
  Tensor y;
  dispatch_float(v, [&](auto type) {
    using T = decltype(type);
    using Sum = SumOf<T>;
    cpu::CsrSketchArgs<T> args{};
    args.crow = in<int64_t>(starts), args.col = in<int64_t>(columns), args.values = in<T>(v);
    args.rows = starts.numel() - 1, args.cols = cols;
    args.op = {in<int64_t>(keys), keys.numel(), d, nnz, row_begin, row_end, col_offset};
    y = run_tiles<Sum>(args, false, v.options().dtype(sum_dtype(v)),
                       [](const auto& tiled, int64_t begin, int64_t end) {
                         cpu::csr_sketch<T>(tiled, begin, end);
                       });
  });
  return y;
}

Tensor sparse_sketch_adjoint_cpu(const Tensor& y, const Tensor& key, int64_t d, int64_t nnz,
                                 int64_t row_begin, int64_t row_end, int64_t col_offset,
                                 int64_t cols) {
  constexpr const char* op = "sparse_sketch_adjoint";
  const Tensor keys = check_sketch(op, key, y.device(), d, row_begin, row_end, col_offset, cols);
  check_nonzeros(op, nnz, d);
  const Tensor sketched = check_sketched(op, y, keys, row_end - row_begin);
  const Tensor x = at::empty({cols, y.size(2)}, sketched.options());
  const auto run = [&](auto type) {
    using Sum = decltype(type);
    const auto scale = static_cast<Sum>(scale_of(nnz));
    const cpu::SparseAdjointArgs<Sum> args{
        in<Sum>(sketched),
        out<Sum>(x),
        cols,
        y.size(2),
        {in<int64_t>(keys), keys.numel(), d, nnz, row_begin, row_end, col_offset},
        scale};
    parallel_groups(
        cols,
        [&](int64_t begin, int64_t end) { cpu::sparse_sketch_adjoint<Sum>(args, begin, end); },
        1024);
  };
  sketched.scalar_type() == at::kDouble ? run(double{}) : run(float{});
  return x;
}

std::tuple<Tensor, Tensor> sparse_sketch_entries_cpu(const Tensor& key, int64_t d, int64_t nnz,
                                                     int64_t col_offset, int64_t cols) {
  constexpr const char* op = "sparse_sketch_entries";
  const Tensor keys = check_sketch(op, key, key.device(), d, 0, d, col_offset, cols);
  check_nonzeros(op, nnz, d);
  const Tensor rows = at::empty({keys.numel(), nnz, cols}, keys.options());
  const Tensor signs = at::empty(rows.sizes(), keys.options().dtype(at::kChar));
  const cpu::SparseEntriesArgs args{out<int64_t>(rows),
                                    out<int8_t>(signs),
                                    cols,
                                    {in<int64_t>(keys), keys.numel(), d, nnz, 0, d, col_offset}};
  parallel_groups(
      cols, [&](int64_t begin, int64_t end) { cpu::sparse_sketch_entries(args, begin, end); },
      4096);
  return {rows, signs};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "sparse_sketch(Tensor a, Tensor key, SymInt d, SymInt nnz, SymInt row_begin, SymInt row_end, "
      "SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "csr_sketch(Tensor values, Tensor crow, Tensor col, SymInt cols, Tensor key, SymInt d, "
      "SymInt nnz, SymInt row_begin, SymInt row_end, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "sparse_sketch_adjoint(Tensor y, Tensor key, SymInt d, SymInt nnz, SymInt row_begin, "
      "SymInt row_end, SymInt col_offset, SymInt cols) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "sparse_sketch_entries(Tensor key, SymInt d, SymInt nnz, SymInt col_offset, SymInt cols) -> "
      "(Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("sparse_sketch", sparse_sketch_cpu);
  m.impl("csr_sketch", csr_sketch_cpu);
  m.impl("sparse_sketch_adjoint", sparse_sketch_adjoint_cpu);
  m.impl("sparse_sketch_entries", sparse_sketch_entries_cpu);
}

#ifdef RANDFUSE_CUDA

namespace {

Tensor sparse_sketch_cuda(const Tensor& a, const Tensor& key, int64_t d, int64_t nnz,
                          int64_t row_begin, int64_t row_end, int64_t col_offset) {
  const Tensor keys = check_sparse_sketch(a, key, d, nnz, row_begin, row_end, col_offset);
  const CudaScope scope(a);
  const SparseOperator s{in<int64_t>(keys), keys.numel(), d, nnz, row_begin, row_end, col_offset};
  const Tensor y = at::empty({s.count, s.rows(), a.size(1)}, a.options().dtype(at::kFloat));
  const cuda::SketchCut cut(a.size(0), a.size(1), s);
  const Tensor sums = at::empty({cut.chunks > 1 ? cut.chunks * y.numel() : 0}, y.options());
  dispatch_cuda_float(a, [&](auto type) {
    using T = decltype(type);
    const cuda::SparseSketchArgs<T> args{
        in<T>(a),      a.size(0),        a.size(1),
        a.stride(0),   a.stride(1),      s,
        out<float>(y), out<float>(sums), static_cast<float>(scale_of(nnz))};
    C10_CUDA_CHECK(cuda::launch_sparse_sketch(args, scope));
  });
  return y;
}

Tensor sparse_sketch_adjoint_cuda(const Tensor& y, const Tensor& key, int64_t d, int64_t nnz,
                                  int64_t row_begin, int64_t row_end, int64_t col_offset,
                                  int64_t cols) {
  constexpr const char* op = "sparse_sketch_adjoint";
  const Tensor keys = check_sketch(op, key, y.device(), d, row_begin, row_end, col_offset, cols);
  check_nonzeros(op, nnz, d);
  const CudaScope scope(y);
  const Tensor sketched = check_sketched(op, y, keys, row_end - row_begin);
  const Tensor x = at::empty({cols, y.size(2)}, sketched.options());
  const cuda::SparseAdjointArgs args{
      in<float>(sketched),
      out<float>(x),
      cols,
      y.size(2),
      {in<int64_t>(keys), keys.numel(), d, nnz, row_begin, row_end, col_offset},
      static_cast<float>(scale_of(nnz))};
  C10_CUDA_CHECK(cuda::launch_sparse_sketch_adjoint(args, scope));
  return x;
}

std::tuple<Tensor, Tensor> sparse_sketch_entries_cuda(const Tensor& key, int64_t d, int64_t nnz,
                                                      int64_t col_offset, int64_t cols) {
  constexpr const char* op = "sparse_sketch_entries";
  const Tensor keys = check_sketch(op, key, key.device(), d, 0, d, col_offset, cols);
  check_nonzeros(op, nnz, d);
  const CudaScope scope(key);
  const Tensor rows = at::empty({keys.numel(), nnz, cols}, keys.options());
  const Tensor signs = at::empty(rows.sizes(), keys.options().dtype(at::kChar));
  const cuda::SparseEntriesArgs args{out<int64_t>(rows),
                                     out<int8_t>(signs),
                                     cols,
                                     {in<int64_t>(keys), keys.numel(), d, nnz, 0, d, col_offset}};
  C10_CUDA_CHECK(cuda::launch_sparse_sketch_entries(args, scope));
  return {rows, signs};
}

}  // namespace

TORCH_LIBRARY_IMPL(randfuse, CUDA, m) {
  m.impl("sparse_sketch", sparse_sketch_cuda);
  m.impl("sparse_sketch_adjoint", sparse_sketch_adjoint_cuda);
  m.impl("sparse_sketch_entries", sparse_sketch_entries_cuda);
}

#endif  // RANDFUSE_CUDA

}  // namespace randfuse
