// multi_sample_scale: x times the mean of M dropout masks, drawn as one count.
#include "../kernels/cpu/multi_sample_scale.h"

#include <torch/library.h>

#include "../kernels/cpu/dropout.h"
#include "checks.h"

#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/multi_sample_scale.h"
#include "cuda.h"
#endif

namespace randfuse {
namespace {

constexpr uint32_t kWordWidth = 5;  // log2 of the lane width

constexpr const char* op = "multi_sample_scale";

// Checks everything but p.
KeyedStream count_stream(const Tensor& x, const Tensor& key, int64_t num_samples,
                         int64_t row_offset, int64_t col_offset) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(1 <= num_samples && num_samples <= kMaxCount, op,
                    ": num_samples must be in [1, ", kMaxCount, "], got ", num_samples);
  const Rows shape = rows_of(x);
  TORCH_CHECK_VALUE(col_offset <= (int64_t{1} << 34) - shape.cols, op,
                    ": col_offset must be in [0, 2**34 - cols], got ", col_offset);
  constexpr uint32_t op_id = static_cast<uint32_t>(Op::kMultiSampleCount);
  KeyedStream stream =
      mask_stream(op, key, x.device(), shape.rows, shape.cols, op_id, 0, row_offset, col_offset);
  stream.domain = domain_word(op_id, kWordWidth);
  return stream;
}

Tensor multi_sample_scale_cpu(const Tensor& x, const Tensor& key, int64_t num_samples, double p,
                              const OptionalTensor& p_tensor, int64_t row_offset,
                              int64_t col_offset) {
  const KeyedStream stream = count_stream(x, key, num_samples, row_offset, col_offset);
  const Rows shape = rows_of(x);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const Tensor matrix = matrix_of(x), y = at::empty(x.sizes(), x.options());
  dispatch_float(x, [&](auto type) {
    using T = decltype(type);
    const cpu::MultiSampleScaleArgs<T> args{
        in<T>(matrix), out<T>(y),
        shape.cols,    row_stride(matrix),
        stream,        cpu::count_rule(rate.threshold, static_cast<int>(num_samples))};
    parallel_groups(cpu::mask_groups(shape.rows, shape.cols, col_offset),
                    [&](int64_t begin, int64_t end) { cpu::multi_sample_scale(args, begin, end); });
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "multi_sample_scale(Tensor x, Tensor key, int num_samples, float p, Tensor? p_tensor, "
      "SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) { m.impl("multi_sample_scale", multi_sample_scale_cpu); }

#ifdef RANDFUSE_CUDA

namespace {

Tensor multi_sample_scale_cuda(const Tensor& x, const Tensor& key, int64_t num_samples, double p,
                               const OptionalTensor& p_tensor, int64_t row_offset,
                               int64_t col_offset) {
  const KeyedStream stream = count_stream(x, key, num_samples, row_offset, col_offset);
  const CudaScope scope(x);
  const CudaRate rate(op, p, p_tensor, x.device());
  const Rows shape = rows_of(x);
  const Tensor matrix = matrix_of(x), y = at::empty(x.sizes(), x.options());
  dispatch_cuda_float(x, [&](auto type) {
    using T = decltype(type);
    const cuda::MultiSampleScaleArgs<T> args{in<T>(matrix),
                                             out<T>(y),
                                             shape.rows,
                                             shape.cols,
                                             row_stride(matrix),
                                             stream,
                                             static_cast<int>(num_samples),
                                             rate};
    C10_CUDA_CHECK(cuda::launch_multi_sample_scale(args, scope));
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(randfuse, CUDA, m) { m.impl("multi_sample_scale", multi_sample_scale_cuda); }

#endif  // RANDFUSE_CUDA

}  // namespace randfuse
