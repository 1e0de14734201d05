// The logits of multi_sample_products.cuh stay in shared memory; a thread takes one row of one
// sample through its classes. Bytes: 2MK and 8SM (forward), 2MK, 4SM and 2SMN of out (gradient),
// where eager moves 7MK a sample and direction. Row operations: N exponentials a row and sample,
// against NK products of the main loop.
#pragma once
#include "multi_sample_cross_entropy.h"
#include "multi_sample_products.cuh"

namespace randfuse::cuda {

// q of one row.
template <class T>
class TargetWeights {
 public:
  RF_DEVICE TargetWeights(const MultiSampleCrossEntropyArgs<T>& p, int64_t row)
      : p_(p), row_(row), label_(p.labels ? p.labels[row] : 0) {}

  RF_DEVICE float operator[](int64_t c) const {
    if (p_.labels && label_ == p_.ignore_index) return 0.0f;
    if (p_.labels && (label_ < 0 || label_ >= p_.head.n)) return NAN;
    const float t = p_.labels ? float(c == label_) : p_.target[row_ * p_.head.n + c];
    const float q = (1.0f - p_.smoothing) * t + p_.smoothing / static_cast<float>(p_.head.n);
    return p_.class_weight ? p_.class_weight[c] * q : q;
  }

 private:
  const MultiSampleCrossEntropyArgs<T>& p_;
  int64_t row_, label_;
};

template <class T, int kN, bool kGrad>
__global__ void __launch_bounds__(kThreads, kSampledResident)
    multi_sample_cross_entropy_kernel(const MultiSampleCrossEntropyArgs<T> p,
                                      const SampledPlan plan) {
  const DropoutLinearArgs<T>& head = p.head;
  const Rate rate = resolve(head.rate);
  const uint32_t sample = plan.group() * kSamples<kN>;
  const int samples = static_cast<int>(min(head.samples - sample, int64_t{kSamples<kN>}));
  const SlicedSums sums = sampled_products<T, kN>(head, plan, rate.threshold, sample, samples);
  const float scale = static_cast<float>(rate.scale);
  const int n = static_cast<int>(head.n);
  for (int i = threadIdx.x; i < samples * plan.rows(); i += kThreads) {
    const int row = i % plan.rows(), m = i / plan.rows();
    const int64_t r = plan.first_row() + row, place = (sample + m) * head.m + r;
    if (r >= head.m) continue;
    const TargetWeights<T> q(p, r);
    float top = -INFINITY, total = 0.0f;  // the largest logit; sum of q
    bool counts = false;                  // whether any q is not 0
    for (int c = 0; c < n; ++c) {
      const float y = scale * sums.total(row, m * kN + c);
      const float z = head.bias ? y + load1(head.bias + c) : y, weight = q[c];
      sums.at(row, m * kN + c) = z;  // in place of the first slice's sum, which only we read
      top = z > top ? z : top;
      total += weight;
      counts = counts || weight != 0.0f;
    }
    if constexpr (kGrad) {
      const float lse = p.logsumexp[place], g = p.grad[r] / static_cast<float>(head.samples);
      for (int c = 0; c < n; ++c) {
        const float dz = (total * expf(sums.at(row, m * kN + c) - lse) - q[c]) * g;
        store1(head.out + place * n + c, counts ? dz : 0.0f);
      }
    } else {
      float sum = 0.0f, loss = 0.0f;
      for (int c = 0; c < n; ++c) sum += expf(sums.at(row, m * kN + c) - top);
      // Distances from the largest logit first: large logits that are nearly equal lose no digits.
      const float log_sum = logf(sum);
      for (int c = 0; c < n; ++c) {
        const float weight = q[c];  // no class counts that has no weight, were its logit infinite
        if (weight != 0.0f) loss += weight * (log_sum + (top - sums.at(row, m * kN + c)));
      }
      p.logsumexp[place] = top + log_sum;
      p.loss[place] = loss;
    }
  }
}

}  // namespace randfuse::cuda
