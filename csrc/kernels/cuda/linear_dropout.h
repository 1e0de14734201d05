// Epilogue of a linear layer whose output is dropped, and its derivative:
//
//   y = residual + D(act(z))        dz = act'(z) * D(grad)
//
// Pointers are on the device of the stream; sizes and strides are in elements. Asynchronous.
#pragma once
#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "rate.h"

namespace randfuse::cuda {

enum class Activation { kNone, kRelu, kGelu, kSilu };  // gelu is the erf form

template <class T>
struct ActDropoutArgs {
  const T* z;      // (rows, cols)
  const T* other;  // (rows, cols): residual, or null for none; the gradient of y in the derivative
  T* out;          // (rows, cols), row-major; may be z or other if that is row-major too
  int64_t rows, cols;
  int64_t z_stride, other_stride;  // between rows; columns are contiguous
  Activation activation;
  MaskStream stream;
  RateSource rate;
};

template <class T>  // float, half_t, bfloat16_t
cudaError_t launch_act_dropout(const ActDropoutArgs<T>& args, cudaStream_t stream);
template <class T>
cudaError_t launch_act_dropout_grad(const ActDropoutArgs<T>& args, cudaStream_t stream);

}  // namespace randfuse::cuda
