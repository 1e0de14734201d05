// multi_sample_cross_entropy and its gradient on the SIMT executor, against the definition.
#include "../kernels/cuda/multi_sample_cross_entropy.h"

#include "cuda_cases.h"

namespace randfuse::test {
namespace {

struct Case {
  int64_t samples, m, n, k;
  bool labels, weighted;
  float smoothing;
};

template <class T>
void run(const char* dtype, const Case& s, const StreamCase& c) {
  std::ostringstream what;
  what << dtype << " S=" << s.samples << " M=" << s.m << " N=" << s.n << " K=" << s.k
       << (s.labels ? " labels" : " probabilities") << (s.weighted ? " weighted" : "")
       << " smoothing=" << s.smoothing << " " << c;
  std::vector<Stream> streams;
  for (int64_t i = 0; i < s.samples; ++i) streams.emplace_back(c, s.m, Op::kDropout, i);
  const Matrix<T> x(s.m, s.k, s.k, 1), w(s.n, s.k, s.k, 2), bias(1, s.n, s.n, 4);
  const Matrix<float> random(s.m + 2, s.n, s.n, 5), grad(1, s.m, s.m, 6);
  std::vector<int64_t> labels(s.m);
  std::vector<float> target(s.m * s.n), class_weight(s.n);
  for (int64_t r = 0; r < s.m; ++r) labels[r] = r % 7 == 3 ? -100 : r % 11 == 5 ? s.n : r * 5 % s.n;
  for (int64_t i = 0; i < s.m * s.n; ++i) target[i] = std::abs(random.data[i]);
  for (int64_t i = 0; i < s.n; ++i) class_weight[i] = std::abs(random.data[s.m * s.n + i]);

  std::vector<float> lse, loss;
  cuda::MultiSampleCrossEntropyArgs<T> a{};
  a.head.m = s.m, a.head.n = s.n, a.head.k = s.k, a.head.samples = s.samples;
  a.head.x = x.data.data(), a.head.weight = w.data.data(), a.head.bias = bias.data.data();
  a.head.x_stride = a.head.weight_stride = s.k;
  a.head.stream = streams[0].mask, a.head.rate = streams[0].rate;
  a.labels = s.labels ? labels.data() : nullptr, a.target = s.labels ? nullptr : target.data();
  a.class_weight = s.weighted ? class_weight.data() : nullptr;
  a.ignore_index = -100, a.smoothing = s.smoothing, a.grad = grad.data.data();
  const auto forward = check::reproducible(what.str(), [&] {
    std::vector<float> out(2 * s.samples * s.m, std::numeric_limits<float>::quiet_NaN());
    a.logsumexp = out.data(), a.loss = out.data() + s.samples * s.m;
    CHECK(cuda::launch_multi_sample_cross_entropy(a, nullptr) == cudaSuccess, what.str());
    return out;
  });
  std::vector<float> saved(forward.begin(), forward.begin() + s.samples * s.m);
  a.logsumexp = saved.data();
  const auto gradient = check::reproducible(what.str(), [&] {
    std::vector<T> out(s.samples * s.m * s.n, poison<T>());
    a.head.out = out.data();
    CHECK(cuda::launch_multi_sample_cross_entropy_grad(a, nullptr) == cudaSuccess, what.str());
    return out;
  });

  for (int64_t i = 0; i < s.samples * s.m; ++i) {
    const int64_t sample = i / s.m, r = i % s.m;
    std::vector<double> z(s.n), q(s.n);
    double size = 1.0, sum = 0.0, total = 0.0, expected = 0.0;
    bool counts = false;
    for (int64_t n = 0; n < s.n; ++n) {
      z[n] = bias.at(0, n);
      for (int64_t k = 0; k < s.k; ++k) {
        const double term = streams[sample].keep(r, k) ? x.at(r, k) * w.at(n, k) : 0.0;
        z[n] += streams[sample].scale() * term, size += streams[sample].scale() * std::abs(term);
      }
      const double t = s.labels ? labels[r] == n : target[r * s.n + n];
      q[n] = ((1.0 - s.smoothing) * t + double{s.smoothing} / s.n) *
             (s.weighted ? class_weight[n] : 1.0);
      if (s.labels && labels[r] == s.n) q[n] = std::nan("");
      if (s.labels && labels[r] == -100) q[n] = 0.0;
      sum += std::exp(z[n]), total += q[n], counts = counts || q[n] != 0.0;
    }
    const double lse = std::log(sum), tiny = 4e-6 * size;
    for (int64_t n = 0; n < s.n; ++n) expected += q[n] != 0.0 ? q[n] * (lse - z[n]) : 0.0;
    const auto same = [&](double got, double want, double absolute) {
      return std::isnan(want) ? std::isnan(got) : std::abs(got - want) <= absolute;
    };
    const float got_loss = forward[s.samples * s.m + i];
    CHECK(same(forward[i], lse, tiny),
          what.str() << " logsumexp " << i << ": got " << forward[i] << ", expected " << lse);
    CHECK(same(got_loss, expected, tiny * (1.0 + total)),
          what.str() << " loss " << i << ": got " << got_loss << ", expected " << expected);
    for (int64_t n = 0; n < s.n; ++n) {
      const double dz = (total * std::exp(z[n] - lse) - q[n]) * grad.at(0, r) / s.samples;
      const double want = counts ? dz : 0.0, got = to_float(gradient[i * s.n + n]);
      CHECK(
          same(got, want, tiny * (1.0 + total) + 0x1p-7 * std::abs(want)),
          what.str() << " gradient " << i << "," << n << ": got " << got << ", expected " << want);
    }
  }
}

// Equal logits of 2^14, where the log-sum-exp has steps of 2^-10: the loss is log N all the same.
void large_logits() {
  const Stream stream(kStreamCases[0], 1, Op::kDropout, 0);
  const std::vector<bfloat16_t> x(8), w(6 * 8), bias(6, from_float<bfloat16_t>(0x1p14f));
  const int64_t label = 2;
  float lse = 0.0f, loss = 0.0f;
  cuda::MultiSampleCrossEntropyArgs<bfloat16_t> a{};
  a.head.m = 1, a.head.n = 6, a.head.k = 8, a.head.samples = 1;
  a.head.x = x.data(), a.head.weight = w.data(), a.head.bias = bias.data();
  a.head.x_stride = a.head.weight_stride = 8;
  a.head.stream = stream.mask, a.head.rate = stream.rate;
  a.labels = &label, a.ignore_index = -100, a.logsumexp = &lse, a.loss = &loss;
  CHECK(cuda::launch_multi_sample_cross_entropy(a, nullptr) == cudaSuccess, "large logits");
  CHECK(std::abs(loss - std::log(6.0)) <= 1e-6, "large logits: got a loss of " << loss);
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  using randfuse::bfloat16_t, randfuse::half_t;
  // Each compiled width, one and several groups of samples, one and several slices of the columns.
  run<bfloat16_t>("bfloat16", {5, 20, 6, 72, true, false, 0.0f}, kStreamCases[0]);
  run<half_t>("half", {9, 18, 16, 45, true, true, 0.2f}, kStreamCases[2]);
  run<bfloat16_t>("bfloat16", {3, 20, 20, 40, false, true, 0.1f}, kStreamCases[1]);
  run<half_t>("half", {3, 10, 61, 33, true, true, 0.0f}, kStreamCases[4]);
  run<bfloat16_t>("bfloat16", {2, 8, 128, 40, false, false, 0.0f}, kStreamCases[3]);
  run<half_t>("half", {8, 400, 3, 9, true, false, 0.0f}, kStreamCases[0]);
  run<bfloat16_t>("bfloat16", {1, 1, 1, 1, true, false, 0.0f}, kStreamCases[7]);
  large_logits();
  return check::report("test_cuda_multi_sample_cross_entropy");
}
