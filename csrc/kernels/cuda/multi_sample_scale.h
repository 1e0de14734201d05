// out = x * (count of the masks that keep it) * (one over the mean count), for float, half_t and
// bfloat16_t: the mean of `samples` dropout masks, drawn as one Binomial count. Asynchronous.
#pragma once
#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "rate.h"

namespace randfuse::cuda {

template <class T>
struct MultiSampleScaleArgs {
  const T* x;  // (rows, cols)
  T* out;      // (rows, cols), row-major; may be x
  int64_t rows, cols;
  int64_t x_stride;   // elements between rows; columns are contiguous
  MaskStream stream;  // of 32-bit lanes
  int samples;        // 1 ... kMaxCount
  RateSource rate;
};

template <class T>
cudaError_t launch_multi_sample_scale(const MultiSampleScaleArgs<T>& args, cudaStream_t stream);

}  // namespace randfuse::cuda
