// dense_sketch (Gaussian and Rademacher), its adjoint and its entries. Each task makes tiles of S in
// its own 256 KiB and multiplies them by the library on its own thread: the sum of a task is in a
// fixed order, so no bit depends on the number of threads.
#include "../kernels/cpu/dense_sketch.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "sketch.h"

namespace randfuse {
namespace {

using cpu::kTileCols;
using cpu::kTileRows;

cpu::Family family_of(const char* op, std::string_view name) {
  TORCH_CHECK_VALUE(name == "gaussian" || name == "rademacher", op,
                    ": family must be gaussian or rademacher, got '", name, "'");
  return name == "gaussian" ? cpu::Family::kGaussian : cpu::Family::kRademacher;
}

struct Block {  // rows [row_begin, row_end) and the columns from col_offset on of each operator
  cpu::Family family;
  Tensor keys;
  int64_t d, row_begin, row_end, col_offset;

  int64_t rows() const { return row_end - row_begin; }
  double scale() const { return 1 / std::sqrt(static_cast<double>(d)); }

  // Tile (rows, cols) at (row, col) of the block of operator k, in the dtype of `like`.
  Tensor tile(int64_t k, int64_t row, int64_t rows, int64_t col, int64_t cols,
              const Tensor& like) const {
    const Tensor s = at::empty({rows, cols}, like.options().dtype(at::kFloat));
    cpu::dense_sketch_entries({out<float>(s), rows, cols, family,
                               static_cast<uint64_t>(in<int64_t>(keys)[k]), row_begin + row,
                               col_offset + col},
                              0, rows);
    return s.to(like.scalar_type());
  }
};

// body(task) on the threads, which inherit neither the guards of this one nor its modes.
template <class Body>
void for_each_task(int64_t tasks, const Body& body) {
  parallel_groups(
      tasks,
      [&](int64_t begin, int64_t end) {
        const at::AutoDispatchBelowADInplaceOrView no_autograd;
        const NoAutocast no_autocast;
        for (int64_t task = begin; task < end; ++task) body(task);
      },
      1);
}

Tensor dense_sketch_cpu(const Tensor& a, const Tensor& key, c10::string_view family, int64_t d,
                        int64_t row_begin, int64_t row_end, int64_t col_offset) {
  constexpr const char* op = "dense_sketch";
  check_float(op, "a", a);
  TORCH_CHECK_VALUE(a.dim() == 2, op, ": a must have shape (m, n), got ", a.sizes());
  const int64_t m = a.size(0), n = a.size(1);
  const Block block{family_of(op, family),
                    check_sketch(op, key, a.device(), d, row_begin, row_end, col_offset, m),
                    d,
                    row_begin,
                    row_end,
                    col_offset};
  const Tensor y =
      at::zeros({key.numel(), block.rows(), n}, a.options().dtype(sum_dtype(a)));
  // Few rows are shared out in smaller tasks.
  const int64_t height = std::clamp<int64_t>((key.numel() * block.rows() + 7) / 8, 16, kTileRows);
  const int64_t strips = (block.rows() + height - 1) / height;
  for_each_task(key.numel() * strips, [&](int64_t task) {
    const int64_t k = task / strips, row = task % strips * height;
    const int64_t rows = std::min(height, block.rows() - row);
    Tensor sums = y.select(0, k).narrow(0, row, rows);
    for (int64_t col = 0; col < m; col += kTileCols) {
      const int64_t cols = std::min(kTileCols, m - col);
      const Tensor s = block.tile(k, row, rows, col, cols, y);
      at::addmm_out(sums, sums, s, a.narrow(0, col, cols).to(y.scalar_type()), 1, block.scale());
    }
  });
  return y;
}

Tensor dense_sketch_adjoint_cpu(const Tensor& y, const Tensor& key, c10::string_view family,
                                int64_t d, int64_t row_begin, int64_t row_end, int64_t col_offset,
                                int64_t cols) {
  constexpr const char* op = "dense_sketch_adjoint";
  const Block block{family_of(op, family),
                    check_sketch(op, key, y.device(), d, row_begin, row_end, col_offset, cols),
                    d,
                    row_begin,
                    row_end,
                    col_offset};
  const Tensor sketched = check_sketched(op, y, block.keys, block.rows());
  const Tensor x = at::zeros({cols, y.size(2)}, sketched.options());
  // Tiles of the same size, the other way up.
  const int64_t width = std::clamp<int64_t>((cols + 7) / 8, 16, kTileCols);
  for_each_task((cols + width - 1) / width, [&](int64_t task) {
    const int64_t col = task * width, count = std::min(width, cols - col);
    Tensor sums = x.narrow(0, col, count);
    for (int64_t k = 0; k < key.numel(); ++k) {
      for (int64_t row = 0; row < block.rows(); row += kTileRows) {
        const int64_t rows = std::min(kTileRows, block.rows() - row);
        const Tensor s = block.tile(k, row, rows, col, count, x);
        at::addmm_out(sums, sums, s.t(), sketched.select(0, k).narrow(0, row, rows), 1,
                      block.scale());
      }
    }
  });
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
