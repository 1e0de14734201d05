#include "multi_sample_linear.cuh"

namespace randfuse::cuda {
namespace {

template <class T, int kN>
cudaError_t forward(const DropoutLinearArgs<T>& a, cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t status = multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  const SampledPlan plan = sampled_plan<kN>(a, multiprocessors);
  return launch(multi_sample_linear_kernel<T, kN>, plan.tiles * plan.groups, kThreads,
                kSampledShared, stream, a, plan);
}

}  // namespace

cudaError_t multi_sample_linear_workspace(Product product, int64_t m, int64_t n, int64_t k,
                                          int64_t samples, int64_t col_offset, int64_t* floats) {
  *floats = 0;
  if (product == Product::kForward && samples > 1) return cudaSuccess;
  return dropout_linear_workspace(product, m, n, k, samples, col_offset, floats);
}

template <class T>
cudaError_t launch_multi_sample_linear(Product product, const DropoutLinearArgs<T>& a,
                                       cudaStream_t stream) {
  const bool by_dropout_linear = product != Product::kForward || a.samples == 1;
  if (by_dropout_linear) return launch_dropout_linear(product, a, stream);
  if (a.m == 0 || a.n == 0 || a.k == 0 || a.samples < 1) return cudaErrorInvalidValue;
  if (a.n > kMaxN) return cudaErrorInvalidValue;
  return with_width(a.n, [&](auto width) { return forward<T, decltype(width)::value>(a, stream); });
}

template cudaError_t launch_multi_sample_linear(Product, const DropoutLinearArgs<half_t>&,
                                                cudaStream_t);
template cudaError_t launch_multi_sample_linear(Product, const DropoutLinearArgs<bfloat16_t>&,
                                                cudaStream_t);

}  // namespace randfuse::cuda
