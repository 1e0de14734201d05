// kept_blocks: the choice of which blocks of columns a row of blocks keeps. The CPU only: on a GPU
// it is Triton's or the reference's.
#include "../kernels/cpu/kept_blocks.h"

#include <torch/library.h>

#include "checks.h"

namespace randfuse {
namespace {

Tensor kept_blocks_cpu(const Tensor& key, int64_t rows, int64_t n, int64_t kept, int64_t coin,
                       int64_t role, int64_t row_offset) {
  constexpr const char* op = "kept_blocks";
  constexpr int64_t kWord = int64_t{1} << 32;
  TORCH_CHECK_VALUE(0 <= rows, op, ": rows must be at least 0, got ", rows);
  TORCH_CHECK_VALUE(0 <= n && n < kWord, op, ": n must be in [0, 2**32), got ", n);
  TORCH_CHECK_VALUE(0 <= kept && kept <= n, op, ": kept must be in [0, n], got ", kept);
  TORCH_CHECK_VALUE(0 <= coin && coin < kWord && (coin == 0 || kept < n), op,
                    ": coin must be in [0, 2**32), and 0 where all are kept, got ", coin);
  TORCH_CHECK_VALUE(0 <= role && role < kWord / 2, op, ": role must be in [0, 2**31), got ", role);
  TORCH_CHECK_TYPE(key.scalar_type() == at::kLong, op, ": key must be int64, got ",
                   dtype_name(key));
  TORCH_CHECK_VALUE(key.dim() <= 1, op, ": key must have shape () or (G,), got ", key.sizes());
  TORCH_CHECK_VALUE(0 <= row_offset && row_offset <= kWord - rows, op,
                    ": row_offset must be in [0, 2**32 - rows], got ", row_offset);
  const Tensor own = key.contiguous();
  const Tensor out = at::empty({key.numel(), rows, kept + (coin > 0)}, key.options());
  const cpu::KeptBlocksArgs args{
      own.const_data_ptr<int64_t>(),  rows, row_offset, n, kept, coin, static_cast<uint32_t>(role),
      out.mutable_data_ptr<int64_t>()};
  at::parallel_for(0, key.numel() * rows, 1,
                   [&](int64_t begin, int64_t end) { cpu::kept_blocks(args, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "kept_blocks(Tensor key, SymInt rows, int n, int kept, int coin, int role, "
      "SymInt row_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) { m.impl("kept_blocks", kept_blocks_cpu); }

}  // namespace randfuse
