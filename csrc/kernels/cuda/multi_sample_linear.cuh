// The forward product of multi_sample_linear: scale, bias and one store of the sums of
// multi_sample_products.cuh. Bytes: 2MK + 2SMN (+ W, from L2 by every block).
#pragma once
#include "multi_sample_linear.h"
#include "multi_sample_products.cuh"

namespace randfuse::cuda {

template <class T, int kN>
__global__ void __launch_bounds__(kThreads, kSampledResident)
    multi_sample_linear_kernel(const DropoutLinearArgs<T> p, const SampledPlan plan) {
  const Rate rate = resolve(p.rate);
  const uint32_t sample = plan.group() * kSamples<kN>;
  const int samples = static_cast<int>(min(p.samples - sample, int64_t{kSamples<kN>}));
  const SlicedSums sums = sampled_products<T, kN>(p, plan, rate.threshold, sample, samples);
  const int64_t row0 = plan.first_row();
  for (int i = threadIdx.x; i < samples * plan.rows() * kN; i += kThreads) {
    const int n = i % kN, row = i / kN % plan.rows(), m = i / kN / plan.rows();
    if (n >= p.n || row0 + row >= p.m) continue;
    const float y = static_cast<float>(rate.scale) * sums.total(row, m * kN + n);
    store1(p.out + ((sample + m) * p.m + row0 + row) * p.n + n, p.bias ? y + load1(p.bias + n) : y);
  }
}

}  // namespace randfuse::cuda
