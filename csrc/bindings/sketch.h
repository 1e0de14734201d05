// What the bindings of the sketching operators share: the block of an operator, and its checks.
#pragma once
#include <ATen/ops/empty.h>

#include "checks.h"

namespace randfuse {

inline constexpr int64_t kMaxSketchColumns = int64_t{1} << 62;

inline at::ScalarType sum_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// key (K,): K independent operators, of which rows [row_begin, row_end) of d and `cols` columns
// from col_offset on are meant. Returns the keys, contiguous.
inline Tensor check_sketch(const char* op, const Tensor& key, at::Device device, int64_t d,
                           int64_t row_begin, int64_t row_end, int64_t col_offset, int64_t cols) {
  TORCH_CHECK_TYPE(key.scalar_type() == at::kLong, op, ": key must be int64, got ",
                   dtype_name(key));
  TORCH_CHECK_VALUE(key.dim() == 1 && key.numel() > 0, op,
                    ": key must have shape (K,) with K > 0, got ", key.sizes());
  TORCH_CHECK_VALUE(key.device() == device, op, ": key must be on ", device, ", got ",
                    key.device());
  TORCH_CHECK_VALUE(1 <= d && d < int64_t{1} << 31, op, ": d must be in [1, 2**31), got ", d);
  TORCH_CHECK_VALUE(0 <= row_begin && row_begin <= row_end && row_end <= d, op,
                    ": rows must satisfy 0 <= row_begin <= row_end <= d=", d, ", got ", row_begin,
                    " and ", row_end);
  TORCH_CHECK_VALUE(0 <= col_offset && 0 <= cols && col_offset <= kMaxSketchColumns - cols, op,
                    ": col_offset must be in [0, 2**62 - ", cols, "], got ", col_offset);
  return key.contiguous();
}

// y (K, rows, n) of the operators' block, in the dtype of sums.
inline Tensor check_sketched(const char* op, const Tensor& y, const Tensor& key, int64_t rows) {
  check_float(op, "y", y);
  TORCH_CHECK_VALUE(y.dim() == 3 && y.size(0) == key.numel() && y.size(1) == rows, op,
                    ": y must have shape (K, rows, n) = (", key.numel(), ", ", rows, ", n), got ",
                    y.sizes());
  return y.to(sum_dtype(y)).contiguous();
}

}  // namespace randfuse
