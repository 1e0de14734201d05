// dense_sketch (Gaussian and Rademacher), its adjoint and its entries.
#include "../kernels/cpu/dense_sketch.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "sketch.h"

namespace randfuse {
namespace {

cpu::Family family_of(const char* op, std::string_view name) {
  TORCH_CHECK_VALUE(name == "gaussian" || name == "rademacher", op,
                    ": family must be gaussian or rademacher, got '", name, "'");
  return name == "gaussian" ? cpu::Family::kGaussian : cpu::Family::kRademacher;
}

double scale_of(int64_t d) { return 1 / std::sqrt(static_cast<double>(d)); }

// An eighth of the rows a task, in whole registers, so that few rows are shared out too.
int64_t step_of(int64_t rows, int64_t most) {
  return std::clamp<int64_t>((rows + 63) / 64 * 8, 8, most);
}

Tensor dense_sketch_cpu(const Tensor& a, const Tensor& key, c10::string_view family, int64_t d,
                        int64_t row_begin, int64_t row_end, int64_t col_offset) {
  constexpr const char* op = "dense_sketch";
  check_float(op, "a", a);
  TORCH_CHECK_VALUE(a.dim() == 2, op, ": a must have shape (m, n), got ", a.sizes());
  const cpu::Family kind = family_of(op, family);
  const Tensor keys =
      check_sketch(op, key, a.device(), d, row_begin, row_end, col_offset, a.size(0));
  const int64_t rows = row_end - row_begin;
  const Tensor y = at::zeros({keys.numel(), rows, a.size(1)}, a.options().dtype(sum_dtype(a)));
  dispatch_float(a, [&](auto type) {
    using T = decltype(type);
    const cpu::DenseSketchArgs<T> args{
        in<T>(a),
        out<SumOf<T>>(y),
        a.size(0),
        a.size(1),
        a.stride(0),
        a.stride(1),
        step_of(keys.numel() * rows, cpu::kTileRows),
        static_cast<SumOf<T>>(scale_of(d)),
        {in<int64_t>(keys), keys.numel(), row_begin, row_end, col_offset, kind}};
    parallel_groups(
        args.tasks(), [&](int64_t begin, int64_t end) { cpu::dense_sketch<T>(args, begin, end); },
        1);
  });
  return y;
}

Tensor dense_sketch_adjoint_cpu(const Tensor& y, const Tensor& key, c10::string_view family,
                                int64_t d, int64_t row_begin, int64_t row_end, int64_t col_offset,
                                int64_t cols) {
  constexpr const char* op = "dense_sketch_adjoint";
  const cpu::Family kind = family_of(op, family);
  const Tensor keys = check_sketch(op, key, y.device(), d, row_begin, row_end, col_offset, cols);
  const Tensor sketched = check_sketched(op, y, keys, row_end - row_begin);
  const Tensor x = at::zeros({cols, y.size(2)}, sketched.options());
  const auto run = [&](auto type) {
    using Sum = decltype(type);
    const cpu::DenseSketchArgs<Sum> args{
        in<Sum>(sketched),
        out<Sum>(x),
        cols,
        y.size(2),
        y.size(2),
        1,
        step_of(cols, cpu::kTileCols),
        static_cast<Sum>(scale_of(d)),
        {in<int64_t>(keys), keys.numel(), row_begin, row_end, col_offset, kind}};
    parallel_groups(
        args.adjoint_tasks(),
        [&](int64_t begin, int64_t end) { cpu::dense_sketch_adjoint<Sum>(args, begin, end); }, 1);
  };
  sketched.scalar_type() == at::kDouble ? run(double{}) : run(float{});
  return x;
}

Tensor dense_sketch_entries_cpu(const Tensor& key, c10::string_view family, int64_t row_begin,
                                int64_t row_end, int64_t col_offset, int64_t cols) {
  constexpr const char* op = "dense_sketch_entries";
  constexpr int64_t kMostRows = int64_t{1} << 32;
  TORCH_CHECK_VALUE(0 <= row_begin && row_begin <= row_end && row_end <= kMostRows, op,
                    ": rows must satisfy 0 <= row_begin <= row_end <= 2**32, got ", row_begin,
                    " and ", row_end);
  const cpu::Family kind = family_of(op, family);
  const Tensor keys = check_sketch(op, key, key.device(), 1, 0, 1, col_offset, cols);
  const int64_t rows = row_end - row_begin;
  const Tensor s = at::empty({keys.numel(), rows, cols}, keys.options().dtype(at::kFloat));
  // Runs of columns and not rows are shared out: SRHT asks for one long row.
  constexpr int64_t kRun = 1 << 14;
  const int64_t runs = (cols + kRun - 1) / kRun;
  parallel_groups(
      keys.numel() * rows * runs,
      [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t line = task / runs, col = task % runs * kRun;
          cpu::dense_sketch_entries(
              {out<float>(s) + line * cols + col, 1, std::min(kRun, cols - col), kind,
               static_cast<uint64_t>(in<int64_t>(keys)[line / rows]), row_begin + line % rows,
               col_offset + col},
              0, 1);
        }
      },
      1);
  return s;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "dense_sketch(Tensor a, Tensor key, str family, SymInt d, SymInt row_begin, SymInt row_end, "
      "SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dense_sketch_adjoint(Tensor y, Tensor key, str family, SymInt d, SymInt row_begin, "
      "SymInt row_end, SymInt col_offset, SymInt cols) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dense_sketch_entries(Tensor key, str family, SymInt row_begin, SymInt row_end, "
      "SymInt col_offset, SymInt cols) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("dense_sketch", dense_sketch_cpu);
  m.impl("dense_sketch_adjoint", dense_sketch_adjoint_cpu);
  m.impl("dense_sketch_entries", dense_sketch_entries_cpu);
}

}  // namespace randfuse
