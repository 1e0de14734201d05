// Cross entropy of a head under S dropout masks of its input, N <= kMaxN classes, without its
// logits in memory, in fp16 or bf16 with fp32 accumulation. With q the target weights of a row and
// z_s = D_s(x) W^T + bias:
//
//   forward   logsumexp_s = log sum exp z_s,   loss_s = sum q (logsumexp_s - z_s)
//   gradient  out_s = grad / S * (sum(q) softmax(z_s) - q)
//
// q_c = class_weight_c * ((1 - smoothing) * t_c + smoothing / N), t the probabilities or the
// label's one; 0 in a row of ignore_index, NaN in one of another label outside [0, N). Asynchronous
// and deterministic.
#pragma once
#include "dropout_linear.h"

namespace randfuse::cuda {

template <class T>
struct MultiSampleCrossEntropyArgs {
  DropoutLinearArgs<T> head;  // x, weight, bias, stream, rate; out (S, m, n) of the gradient
  const int64_t* labels;      // (m,), or null
  const float* target;        // (m, n) where there are no labels
  const float* class_weight;  // (n,) or null
  int64_t ignore_index;
  float smoothing;
  float* logsumexp;   // (S, m); the gradient reads it
  float* loss;        // (S, m); forward
  const float* grad;  // (m,); gradient
};

template <class T>  // half_t, bfloat16_t
cudaError_t launch_multi_sample_cross_entropy(const MultiSampleCrossEntropyArgs<T>& args,
                                              cudaStream_t stream);
template <class T>
cudaError_t launch_multi_sample_cross_entropy_grad(const MultiSampleCrossEntropyArgs<T>& args,
                                                   cudaStream_t stream);

}  // namespace randfuse::cuda
