// What every binding checks before it touches memory. The public Python functions have checked the
// same already; these guard direct calls of torch.ops.randfuse, and their messages read alike.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/common/dtype.h"
#include "../kernels/common/streams.h"

namespace randfuse {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// 64-column groups a task: about 7 us of work. Threads take tasks as they come, so that one that
// starts late does less; no result depends on who does what.
inline constexpr int64_t kGrain = 512;

template <class Body>
void parallel_groups(int64_t groups, const Body& body, int64_t grain = kGrain) {
  if (groups <= grain) return body(0, groups);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(grain)) < groups;) {
      body(begin, std::min(begin + grain, groups));
    }
  });
}

// The at:: products inside an op keep the dtype that the op was called with.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

struct Rows {  // a tensor (…, cols) seen as a matrix; leading dims are flattened into rows
  int64_t rows, cols;
};

inline Rows rows_of(const Tensor& x) {
  if (x.dim() == 0) return {1, 1};
  const int64_t cols = x.size(-1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return {rows, cols};
}

// (rows, cols) with unit column stride; copies only when the strides of x leave no other way.
inline Tensor matrix_of(const Tensor& x) {
  const Rows r = rows_of(x);
  const Tensor m = x.reshape({r.rows, r.cols});
  return r.cols <= 1 || m.stride(1) == 1 ? m : m.contiguous();
}

// Elements between rows; a matrix of one row may carry any stride.
inline int64_t row_stride(const Tensor& matrix) {
  return matrix.size(0) > 1 ? matrix.stride(0) : matrix.size(1);
}

inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = last;
  return shape;
}

// As Python prints it: torch.float32.
inline std::string dtype_name(const Tensor& x) {
  return "torch." + std::string(c10::getDtypeNames(x.scalar_type()).first);
}

inline void check_float(const char* op, const char* name, const Tensor& x) {
  const auto t = x.scalar_type();
  TORCH_CHECK_TYPE(
      t == at::kFloat || t == at::kHalf || t == at::kBFloat16 || (t == at::kDouble && x.is_cpu()),
      op, ": ", name, " must be float32, float16",
      x.is_cpu() ? ", bfloat16 or float64" : " or bfloat16", ", got ", dtype_name(x));
}

inline void check_like(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK_TYPE(x.scalar_type() == like.scalar_type(), op, ": ", name, " must be ",
                   dtype_name(like), ", got ", dtype_name(x));
  TORCH_CHECK_VALUE(x.device() == like.device(), op, ": ", name, " must be on ", like.device(),
                    ", got ", x.device());
}

// x (…, K), weight (N, K), bias (N,) of one dtype on one device.
inline void check_linear(const char* op, const Tensor& x, const Tensor& weight,
                         const OptionalTensor& bias) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have at least one dimension, got 0");
  check_like(op, "weight", weight, x);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == x.size(-1), op,
                    ": weight must have shape (N, K=", x.size(-1), "), got ", weight.sizes());
  if (!bias.has_value()) return;
  check_like(op, "bias", *bias, x);
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), op,
                    ": bias must have shape (N,) = (", weight.size(0), "), got ", bias->sizes());
}

// The place of a (rows, cols) matrix in the random stream, with the keys that it points to.
struct KeyedStream : MaskStream {
  Tensor key;  // contiguous
};

inline KeyedStream mask_stream(const char* op, const Tensor& key, at::Device device, int64_t rows,
                               int64_t cols, int64_t op_id, int64_t sample, int64_t row_offset,
                               int64_t col_offset) {
  TORCH_CHECK_TYPE(key.scalar_type() == at::kLong, op, ": key must be int64, got ",
                   dtype_name(key));
  TORCH_CHECK_VALUE(key.dim() <= 1, op, ": key must have shape () or (G,), got ", key.sizes());
  TORCH_CHECK_VALUE(key.device() == device, op, ": key must be on ", device, ", got ",
                    key.device());
  TORCH_CHECK_VALUE(0 <= op_id && op_id < 1 << 16, op, ": op must be in [0, 2**16), got ", op_id);
  const int64_t keys = key.numel();
  TORCH_CHECK_VALUE(keys > 0 && rows % keys == 0, op, ": key must have a length that divides the ",
                    rows, " rows, got ", keys);
  TORCH_CHECK_VALUE(0 <= row_offset && row_offset <= (int64_t{1} << 32) - rows, op,
                    ": row_offset must be in [0, 2**32 - rows], got ", row_offset);
  TORCH_CHECK_VALUE(0 <= col_offset && col_offset <= (int64_t{1} << 35) - cols, op,
                    ": col_offset must be in [0, 2**35 - cols], got ", col_offset);
  TORCH_CHECK_VALUE(0 <= sample && sample < (int64_t{1} << 32), op,
                    ": sample must be in [0, 2**32), got ", sample);
  const Tensor own = key.contiguous();  // vmap hands down one key expanded over the batch
  return {{own.const_data_ptr<int64_t>(), std::max<int64_t>(rows / keys, 1), row_offset, col_offset,
           static_cast<uint32_t>(sample), mask_domain(static_cast<uint32_t>(op_id))},
          own};
}

// The probability of a CPU op. A tensor on the CPU can be read, so its value is checked like a
// float's.
inline Rate cpu_rate(const char* op, double p, const OptionalTensor& p_tensor) {
  if (p_tensor.has_value()) {
    TORCH_CHECK_VALUE(p_tensor->dim() == 0 && p_tensor->is_floating_point() && p_tensor->is_cpu(),
                      op, ": p must be a number or a 0-d floating tensor on cpu, got ",
                      p_tensor->sizes(), " ", dtype_name(*p_tensor), " on ", p_tensor->device());
    p = p_tensor->item<double>();
  }
  TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, op, ": p must be in [0, 1], got ", p);
  return drop_rate(p);
}

// Calls body(T{}) with the storage type of x.
template <class Body>
void dispatch_float(const Tensor& x, Body&& body) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return body(float{});
    case at::kHalf:
      return body(half_t{});
    case at::kBFloat16:
      return body(bfloat16_t{});
    default:
      return body(double{});  // check_float has refused the rest
  }
}

template <class T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace randfuse
