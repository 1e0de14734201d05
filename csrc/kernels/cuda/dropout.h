// y = x * scale where the stream's lane is not below the threshold, else 0; and the mask alone.
// Pointers are on the device of the stream; sizes and strides are in elements. Asynchronous: the
// status is that of the launch.
#pragma once
#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "rate.h"

namespace randfuse::cuda {

template <class T>
struct DropoutArgs {
  const T* x;  // (rows, cols)
  T* y;        // (rows, cols), row-major; may be x if that is row-major too
  int64_t rows, cols;
  int64_t x_stride;  // between rows of x; columns are contiguous
  MaskStream stream;
  RateSource rate;
};

struct DropoutMaskArgs {
  bool* mask;  // (rows, cols), row-major; true = kept
  int64_t rows, cols;
  MaskStream stream;
  RateSource rate;
};

template <class T>  // float, half_t, bfloat16_t
cudaError_t launch_dropout(const DropoutArgs<T>& args, cudaStream_t stream);
cudaError_t launch_dropout_mask(const DropoutMaskArgs& args, cudaStream_t stream);

}  // namespace randfuse::cuda
