// distinct_rows: which rows a trigonometric sketch keeps.
#include "../kernels/cpu/distinct_rows.h"

#include <torch/library.h>

#include "sketch.h"

namespace randfuse {
namespace {

Tensor distinct_rows_cpu(const Tensor& key, int64_t substream, int64_t population, int64_t count) {
  constexpr const char* op = "distinct_rows";
  constexpr int64_t kMost = int64_t{1} << 32;
  TORCH_CHECK_VALUE(0 <= population && population < kMost, op,
                    ": population must be in [0, 2**32), got ", population);
  TORCH_CHECK_VALUE(0 <= count && count <= population, op, ": count must be in [0, ", population,
                    "], got ", count);
  TORCH_CHECK_VALUE(0 <= substream && substream < kMost, op,
                    ": substream must be in [0, 2**32), got ", substream);
  const Tensor keys = check_sketch(op, key, key.device(), 1, 0, 1, 0, 0);
  const Tensor rows = at::empty({keys.numel(), count}, keys.options());
  for (int64_t k = 0; k < keys.numel(); ++k) {
    cpu::distinct_rows(static_cast<uint64_t>(in<int64_t>(keys)[k]),
                       static_cast<uint32_t>(substream), population, count,
                       out<int64_t>(rows) + k * count);
  }
  return rows;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def("distinct_rows(Tensor key, SymInt substream, SymInt population, SymInt count) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) { m.impl("distinct_rows", distinct_rows_cpu); }

}  // namespace randfuse
