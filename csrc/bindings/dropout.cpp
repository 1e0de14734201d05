// dropout and dropout_mask: schema, checks, allocation, threads. The exemplar of a binding.
#include "../kernels/cpu/dropout.h"

#include <torch/library.h>

#include "checks.h"
#include "dropout.h"

#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/dropout.h"
#include "cuda.h"
#endif

namespace randfuse {
namespace {

Tensor dropout_cpu(const Tensor& x, const Tensor& key, double p, const OptionalTensor& p_tensor,
                   int64_t op, int64_t sample, int64_t row_offset, int64_t col_offset) {
  check_float("dropout", "x", x);
  const Rows shape = rows_of(x);
  const KeyedStream stream = mask_stream("dropout", key, x.device(), shape.rows, shape.cols, op,
                                         sample, row_offset, col_offset);
  const Rate rate = cpu_rate("dropout", p, p_tensor);
  const Tensor y = at::empty(x.sizes(), x.options());
  drop_rows_cpu(matrix_of(x), y.view({shape.rows, shape.cols}), stream, rate);
  return y;
}

void check_mask_shape(at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(shape.size() == 2 && shape[0] >= 0 && shape[1] >= 0,
                    "dropout_mask: shape must be two sizes (rows, cols), got ", shape);
}

Tensor dropout_mask_cpu(const Tensor& key, at::IntArrayRef shape, double p,
                        const OptionalTensor& p_tensor, int64_t op, int64_t sample,
                        int64_t row_offset, int64_t col_offset) {
  check_mask_shape(shape);
  const KeyedStream stream = mask_stream("dropout_mask", key, key.device(), shape[0], shape[1], op,
                                         sample, row_offset, col_offset);
  const Rate rate = cpu_rate("dropout_mask", p, p_tensor);
  const Tensor mask = at::empty(shape, key.options().dtype(at::kBool));
  const cpu::DropoutMaskArgs args{mask.mutable_data_ptr<bool>(), shape[1], stream, rate};
  parallel_groups(cpu::mask_groups(shape[0], shape[1], col_offset),
                  [&](int64_t begin, int64_t end) { cpu::dropout_mask(args, begin, end); });
  return mask;
}

}  // namespace

void drop_rows_cpu(const Tensor& x, const Tensor& y, const MaskStream& stream, const Rate& rate) {
  dispatch_float(x, [&](auto type) {
    using T = decltype(type);
    const cpu::DropoutArgs<T> args{in<T>(x), out<T>(y), x.size(1), row_stride(x), stream, rate};
    parallel_groups(cpu::mask_groups(x.size(0), x.size(1), stream.col_offset),
                    [&](int64_t begin, int64_t end) { cpu::dropout<T>(args, begin, end); });
  });
}

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "dropout(Tensor x, Tensor key, float p, Tensor? p_tensor, int op, SymInt sample, "
      "SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dropout_mask(Tensor key, SymInt[] shape, float p, Tensor? p_tensor, int op, SymInt sample, "
      "SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("dropout", dropout_cpu);
  m.impl("dropout_mask", dropout_mask_cpu);
}

#ifdef RANDFUSE_CUDA

void drop_rows_cuda(const Tensor& x, const Tensor& y, const MaskStream& stream,
                    const cuda::RateSource& rate) {
  dispatch_cuda_float(x, [&](auto type) {
    using T = decltype(type);
    const cuda::DropoutArgs<T> args{in<T>(x),      out<T>(y), x.size(0), x.size(1),
                                    row_stride(x), stream,    rate};
    C10_CUDA_CHECK(cuda::launch_dropout(args, c10::cuda::getCurrentCUDAStream()));
  });
}

namespace {

Tensor dropout_cuda(const Tensor& x, const Tensor& key, double p, const OptionalTensor& p_tensor,
                    int64_t op, int64_t sample, int64_t row_offset, int64_t col_offset) {
  check_float("dropout", "x", x);
  const Rows shape = rows_of(x);
  const KeyedStream stream = mask_stream("dropout", key, x.device(), shape.rows, shape.cols, op,
                                         sample, row_offset, col_offset);
  const CudaScope scope(x);
  const CudaRate rate("dropout", p, p_tensor, x.device());
  const Tensor y = at::empty(x.sizes(), x.options());
  drop_rows_cuda(matrix_of(x), y.view({shape.rows, shape.cols}), stream, rate);
  return y;
}

Tensor dropout_mask_cuda(const Tensor& key, at::IntArrayRef shape, double p,
                         const OptionalTensor& p_tensor, int64_t op, int64_t sample,
                         int64_t row_offset, int64_t col_offset) {
  check_mask_shape(shape);
  const KeyedStream stream = mask_stream("dropout_mask", key, key.device(), shape[0], shape[1], op,
                                         sample, row_offset, col_offset);
  const CudaScope scope(key);
  const CudaRate rate("dropout_mask", p, p_tensor, key.device());
  const Tensor mask = at::empty(shape, key.options().dtype(at::kBool));
  const cuda::DropoutMaskArgs args{mask.mutable_data_ptr<bool>(), shape[0], shape[1], stream, rate};
  C10_CUDA_CHECK(cuda::launch_dropout_mask(args, scope));
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(randfuse, CUDA, m) {
  m.impl("dropout", dropout_cuda);
  m.impl("dropout_mask", dropout_mask_cuda);
}

#endif  // RANDFUSE_CUDA

}  // namespace randfuse
