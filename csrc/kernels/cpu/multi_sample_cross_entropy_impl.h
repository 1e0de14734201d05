namespace randfuse::RF_ISA {
#include "simd.h"
// simd_math.h builds on simd.h
#include "simd_math.h"

constexpr float kLog2E = 1.44269504f;

// The largest of n values, NaN apart (the sum finds it).
template <class T>
inline T row_max(const T* z, int64_t n) {
  T most = -std::numeric_limits<T>::infinity();
  int64_t c = 0;
  if constexpr (std::is_same_v<T, float>) {
    F32 lanes = broadcast(most);
    for (; c + kF32 <= n; c += kF32) lanes = larger(load(z + c), lanes);
    most = max_of_lanes(lanes);
  }
  for (; c < n; ++c) most = z[c] > most ? z[c] : most;
  return most;
}

// A vector of up to kF32 values, -inf behind the last.
inline F32 load_some(const float* z, int64_t n) {
  float buffer[kF32];
  for (int l = 0; l < kF32; ++l) buffer[l] = l < n ? z[l] : -std::numeric_limits<float>::infinity();
  return load(buffer);
}

// e to the z - shift, less 2^-96, which is nothing beside the largest, 1; so far-off classes have a
// gradient of 0 and not a subnormal one, on which a matrix product is a hundred times slower.
inline F32 exp_of(F32 z, float shift) {
  const F32 e = exp2(mul(sub(z, broadcast(shift)), broadcast(kLog2E)));
  return larger(broadcast(0.0f), sub(e, broadcast(0x1p-96f)));  // in this order: NaN stays
}

inline float sum_of_exp(const float* z, int64_t n, float shift) {
  F32 sum = broadcast(0.0f);
  int64_t c = 0;
  for (; c + kF32 <= n; c += kF32) sum = add(sum, exp_of(load(z + c), shift));
  if (c < n) sum = add(sum, exp_of(load_some(z + c, n - c), shift));
  return sum_of_lanes(sum);
}
inline double sum_of_exp(const double* z, int64_t n, double shift) {
  double sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += std::exp(z[c] - shift);
  return sum;
}

// z = e to the (z - shift), times factor.
inline void exponentials(float* z, int64_t n, float shift, float factor) {
  const F32 f = broadcast(factor);
  int64_t c = 0;
  for (; c + kF32 <= n; c += kF32) store(z + c, mul(exp_of(load(z + c), shift), f));
  if (c < n) {
    float buffer[kF32];
    store(buffer, mul(exp_of(load_some(z + c, n - c), shift), f));
    std::memcpy(z + c, buffer, (n - c) * sizeof(float));
  }
}
inline void exponentials(double* z, int64_t n, double shift, double factor) {
  for (int64_t c = 0; c < n; ++c) z[c] = std::exp(z[c] - shift) * factor;
}

// What the target of a row contributes, the same for all its samples.
template <class T>
struct RowTarget {
  const T* q;     // or null
  T total;        // sum of q, and the weight at the label
  T at_label;     // weight at the label
  int64_t label;  // -1: none
  bool ignored;   // or of no weight at all: no loss and no gradient, whatever the logits
};

// Sums over the classes are in double: a chain of 10^5 float additions loses three digits.
template <class T>
inline RowTarget<T> row_target(const cpu::CrossEntropyArgs<T>& a, int64_t r) {
  RowTarget<T> t{a.weights ? a.weights + r * a.weights_stride : nullptr, 0, 0, -1, false};
  if (a.labels) {
    t.label = a.labels[r];
    t.ignored = t.label == a.ignore_index;
    if (t.ignored) return t;
    t.at_label = a.label_weights ? a.label_weights[t.label] : a.label_weight;
  }
  double total = t.at_label;
  bool counts = t.at_label != 0;
  if (t.q) {
    for (int64_t c = 0; c < a.classes; ++c) {
      total += t.q[c];
      counts |= t.q[c] != 0;
    }
  }
  t.total = static_cast<T>(total);
  t.ignored = !counts;
  return t;
}

template <class T>
void cross_entropy_rows(const cpu::CrossEntropyArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t n = a.classes;
  for (int64_t r = begin; r < end; ++r) {
    const RowTarget<T> t = row_target(a, r);
    double loss = 0;
    for (int64_t s = 0; s < a.samples; ++s) {
      const T* z = a.logits + (s * a.rows + r) * n;
      const T most = row_max(z, n), log_sum = std::log(sum_of_exp(z, n, most));
      a.logsumexp[s * a.logsumexp_stride + r] = most + log_sum;
      if (t.ignored) continue;
      // Distances from the largest logit first: large logits that are nearly equal lose no digits.
      double distances = 0;
      if (t.q) {
        for (int64_t c = 0; c < n; ++c) distances += t.q[c] != 0 ? t.q[c] * (most - z[c]) : 0;
      }
      // By weight: a label of weight 0 adds nothing, not 0 times an infinite distance.
      if (t.at_label != 0) distances += t.at_label * (most - z[t.label]);
      loss += static_cast<double>(t.total) * log_sum + distances;
    }
    if (!t.ignored) a.loss[r] += static_cast<T>(loss * a.factor);
  }
}

template <class T>
void cross_entropy_grad_rows(const cpu::CrossEntropyArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t n = a.classes;
  for (int64_t r = begin; r < end; ++r) {
    const RowTarget<T> t = row_target(a, r);
    const T factor = a.factor * a.grad[r];
    for (int64_t s = 0; s < a.samples; ++s) {
      T* z = a.logits + (s * a.rows + r) * n;
      if (t.ignored) {
        std::memset(z, 0, n * sizeof(T));
        continue;
      }
      exponentials(z, n, a.logsumexp[s * a.logsumexp_stride + r], t.total * factor);
      if (t.q) {
        for (int64_t c = 0; c < n; ++c) z[c] -= t.q[c] * factor;
      }
      if (t.label >= 0) z[t.label] -= t.at_label * factor;
    }
  }
}

}  // namespace randfuse::RF_ISA
