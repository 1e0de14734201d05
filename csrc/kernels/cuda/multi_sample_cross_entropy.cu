#include "multi_sample_cross_entropy.cuh"

namespace randfuse::cuda {
namespace {

template <bool kGrad, class T>
cudaError_t launch_rows(const MultiSampleCrossEntropyArgs<T>& a, cudaStream_t stream) {
  const DropoutLinearArgs<T>& head = a.head;
  if (head.m == 0 || head.n == 0 || head.k == 0 || head.samples < 1) return cudaErrorInvalidValue;
  if (head.n > kMaxN) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  const cudaError_t status = multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  return with_width(head.n, [&](auto width) {
    constexpr int kN = decltype(width)::value;
    const SampledPlan plan = sampled_plan<kN>(head, multiprocessors);
    return launch(multi_sample_cross_entropy_kernel<T, kN, kGrad>, plan.tiles * plan.groups,
                  kThreads, kSampledShared, stream, a, plan);
  });
}

}  // namespace

template <class T>
cudaError_t launch_multi_sample_cross_entropy(const MultiSampleCrossEntropyArgs<T>& args,
                                              cudaStream_t stream) {
  return launch_rows<false>(args, stream);
}

template <class T>
cudaError_t launch_multi_sample_cross_entropy_grad(const MultiSampleCrossEntropyArgs<T>& args,
                                                   cudaStream_t stream) {
  return launch_rows<true>(args, stream);
}

#define RF_INSTANTIATE(T)                                                                       \
  template cudaError_t launch_multi_sample_cross_entropy(const MultiSampleCrossEntropyArgs<T>&, \
                                                         cudaStream_t);                         \
  template cudaError_t launch_multi_sample_cross_entropy_grad(                                  \
      const MultiSampleCrossEntropyArgs<T>&, cudaStream_t)
RF_INSTANTIATE(half_t);
RF_INSTANTIATE(bfloat16_t);
#undef RF_INSTANTIATE

}  // namespace randfuse::cuda
