// What the bindings of other heads use of multi_sample_linear: the products of several masked
// copies of x, on all threads. Matrices have unit column stride; the caller has checked everything.
#pragma once
#include <functional>

#include "checks.h"
#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/rate.h"
#endif

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

// The same by a dropped copy of one sample (of several, if the rows are few) and the library's
// product, on any device: drop(x, y, stream) makes y, which may be x, the dropped x.
using Drop = std::function<void(const Tensor& x, const Tensor& y, const MaskStream& stream)>;
void wide_products(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const SampleStream& stream, const Drop& drop, const Tensor& y);
void add_wide_dgrads(const Tensor& grad, const Tensor& weight, const SampleStream& stream,
                     const Drop& drop, const Tensor& dx);
void add_wide_wgrads(const Tensor& grad, const Tensor& x, const SampleStream& stream,
                     const Drop& drop, const Tensor& dw);

#ifdef RANDFUSE_CUDA
// On the current device and its current stream; rate is not copied.
Drop drop_cuda(const cuda::RateSource& rate);
#endif

}  // namespace randfuse
