#include "multi_sample_scale.cuh"

namespace randfuse::cuda {

template <class T>
cudaError_t launch_multi_sample_scale(const MultiSampleScaleArgs<T>& a, cudaStream_t stream) {
  if (a.samples < 1 || a.samples > kMaxCount) return cudaErrorInvalidValue;
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t status = multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  CountTable table{};
  if (a.rate.device_p == nullptr)
    table.scale = count_table(a.rate.rate.threshold, a.samples, table.thresholds);
  const int64_t shift = a.stream.col_offset % kMaskLanes;
  const bool is_aligned =
      aligned(a.x, a.cols, a.x_stride, shift) && aligned(a.out, a.cols, a.cols, shift);
  const auto kernel =
      is_aligned ? multi_sample_scale_kernel<T, true> : multi_sample_scale_kernel<T, false>;
  const int64_t units = a.rows * ceil_div(shift + a.cols, kMaskLanes);
  const int64_t blocks =
      std::min<int64_t>(ceil_div(units, kThreads), int64_t{multiprocessors} * kMapBlocks);
  return launch(kernel, blocks, kThreads, kScaleShared, stream, a, table);
}

template cudaError_t launch_multi_sample_scale(const MultiSampleScaleArgs<float>&, cudaStream_t);
template cudaError_t launch_multi_sample_scale(const MultiSampleScaleArgs<half_t>&, cudaStream_t);
template cudaError_t launch_multi_sample_scale(const MultiSampleScaleArgs<bfloat16_t>&,
                                               cudaStream_t);

}  // namespace randfuse::cuda
