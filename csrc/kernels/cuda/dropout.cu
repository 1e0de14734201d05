#include "dropout.cuh"

#include "dropout.h"

namespace randfuse::cuda {

template <class T>
cudaError_t launch_dropout(const DropoutArgs<T>& a, cudaStream_t stream) {
  const MapParams<T> p{a.x, nullptr, a.y, a.x_stride, 0, a.rows, a.cols, a.stream, a.rate};
  return launch_map(dropout_kernel<T, true>, dropout_kernel<T, false>, p, stream);
}

cudaError_t launch_dropout_mask(const DropoutMaskArgs& a, cudaStream_t stream) {
  const MapParams<bool> p{nullptr, nullptr, a.mask, 0, 0, a.rows, a.cols, a.stream, a.rate};
  return launch_map(dropout_mask_kernel<true>, dropout_mask_kernel<false>, p, stream);
}

template cudaError_t launch_dropout(const DropoutArgs<float>&, cudaStream_t);
template cudaError_t launch_dropout(const DropoutArgs<half_t>&, cudaStream_t);
template cudaError_t launch_dropout(const DropoutArgs<bfloat16_t>&, cudaStream_t);

}  // namespace randfuse::cuda
