// What the bindings of other heads use of multi_sample_linear: the products of several masked
// copies of x, on all threads. Matrices have unit column stride; the caller has checked everything.
#pragma once
#include "checks.h"

namespace randfuse {

// Samples [first, first + count) of the rows of a stream.
struct SampleStream {
  MaskStream rows;
  int64_t first, count;

  MaskStream operator[](int64_t s) const {
    MaskStream sample = rows;
    sample.sample = static_cast<uint32_t>(first + s);
    return sample;
  }
};

// float64 for float64, else float32: the type of sums.
inline at::ScalarType sum_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// y (count, rows, N) = D_s(x) weight^T + bias; dtype is x's or float32. One weight (N, K) and bias
// (N,) for all samples, or (count, N, K) and (count, N).
Tensor sample_products(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const SampleStream& stream, const Rate& rate, at::ScalarType dtype);
// dx (rows, K) of the type of sums += the sum over s of D_s(grad_s weight); grad (count, rows, N).
void add_sample_dgrads(const Tensor& grad, const Tensor& weight, const SampleStream& stream,
                       const Rate& rate, const Tensor& dx);
// dw (N, K) += the sum over s of grad_s^T D_s(x), or dw (count, N, K) += each; the type of sums.
void add_sample_wgrads(const Tensor& grad, const Tensor& x, const SampleStream& stream,
                       const Rate& rate, const Tensor& dw);

}  // namespace randfuse
