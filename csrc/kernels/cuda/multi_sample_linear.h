// A head under S dropout masks of its input, N <= kMaxN, in fp16 or bf16 with fp32 accumulation
// (D_s masks and scales by sub-stream s of the stream; wider heads keep the library's products):
//
//   forward  Y_s (M,N) = D_s(X) W^T + bias, of all samples
//   dgrad    dX  (M,K) = sum over s of D_s(G_s W)
//   wgrad    dW  (N,K) = sum over s of G_s^T D_s(X)
//
// Of the arguments of dropout_linear, out of the forward product is (S, m, n). Asynchronous and
// deterministic.
#pragma once
#include "dropout_linear.h"

namespace randfuse::cuda {

// Floats of workspace that launch_multi_sample_linear(product) needs on the current device.
cudaError_t multi_sample_linear_workspace(Product product, int64_t m, int64_t n, int64_t k,
                                          int64_t samples, int64_t col_offset, int64_t* floats);

template <class T>  // half_t, bfloat16_t
cudaError_t launch_multi_sample_linear(Product product, const DropoutLinearArgs<T>& args,
                                       cudaStream_t stream);

}  // namespace randfuse::cuda
