// The three products of a dropped input with a narrow weight, N <= kMaxN, in fp16 or bf16 with fp32
// accumulation (D masks and scales by the stream; wider weights keep the library's product):
//
//   forward  Y (M,N) = D(X) W^T + bias
//   dgrad   dX (M,K) = D(G W)
//   wgrad   dW (N,K) = G^T D(X)
//
// The two gradients also do a head with S samples, whose sub-streams follow one another: with G_s
// the gradient of sample s, dgrad is the sum of D_s(G_s W), wgrad that of G_s^T D_s(X).
//
// Pointers are on the device of the stream; sizes and strides are in elements. Asynchronous and
// deterministic: partial sums are added in a fixed order, without atomics.
#pragma once
#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "rate.h"

namespace randfuse::cuda {

inline constexpr int64_t kMaxN = 128;

enum class Product { kForward, kDgrad, kWgrad };

template <class T>
struct DropoutLinearArgs {
  int64_t m, n, k;
  int64_t samples = 1;  // S
  const T* x;           // (m, k); forward and wgrad
  const T* weight;      // (n, k); forward and dgrad
  const T* grad;        // (S, m, n); dgrad and wgrad
  const T* bias;        // (n,) or null; forward
  T* out;               // (m, n), (m, k) or (n, k), row-major
  // Elements between rows; columns are contiguous.
  int64_t x_stride, weight_stride, grad_stride;
  int64_t grad_sample_stride = 0;
  float* workspace;  // of dropout_linear_workspace floats
  MaskStream stream;
  RateSource rate;
};

// Floats of workspace that launch_dropout_linear(product) needs on the current device.
cudaError_t dropout_linear_workspace(Product product, int64_t m, int64_t n, int64_t k,
                                     int64_t samples, int64_t col_offset, int64_t* floats);

template <class T>  // half_t, bfloat16_t
cudaError_t launch_dropout_linear(Product product, const DropoutLinearArgs<T>& args,
                                  cudaStream_t stream);

}  // namespace randfuse::cuda
