// The three products of multi_sample_linear on the SIMT executor, against loops over the
// definition.
#include "../kernels/cuda/multi_sample_linear.h"

#include "cuda_cases.h"

namespace randfuse::test {
namespace {

using cuda::Product;

struct Shape {
  int64_t samples, m, n, k;
  int64_t pad;  // extra elements between rows of every operand, and between samples of the gradient
};

template <class T>
void run(const char* dtype, Product product, const Shape& s, const StreamCase& c, bool with_bias) {
  std::ostringstream what;
  const char* names[] = {"forward", "dgrad", "wgrad"};
  what << names[static_cast<int>(product)] << " " << dtype << " S=" << s.samples << " M=" << s.m
       << " N=" << s.n << " K=" << s.k << " pad=" << s.pad << " " << c
       << (with_bias ? " with bias" : "");
  std::vector<Stream> streams;
  for (int64_t i = 0; i < s.samples; ++i) streams.emplace_back(c, s.m, Op::kDropout, i);
  const int64_t g_rows = s.m + s.pad;
  Matrix<T> x(s.m, s.k, s.k + s.pad, 1), w(s.n, s.k, s.k + s.pad, 2);
  const Matrix<T> g(s.samples * g_rows, s.n, s.n + s.pad, 3), bias(1, s.n, s.n, 4);

  // kept(i, r, k): the masks with their scale, drawn once for all
  std::vector<double> kept;
  for (const Stream& stream : streams) {
    for (int64_t i = 0; i < s.m * s.k; ++i)
      kept.push_back(stream.keep(i / s.k, i % s.k) ? stream.scale() : 0.0);
  }
  const auto mask = [&](int64_t i, int64_t r, int64_t k) { return kept[(i * s.m + r) * s.k + k]; };
  for (int64_t r = 0; r < s.m; ++r) {
    for (int64_t k = 0; k < s.k; ++k) {
      bool dropped = (r * 7 + k) % 5 == 0;
      for (int64_t i = 0; i < s.samples; ++i) dropped = dropped && mask(i, r, k) == 0.0;
      if (dropped) x.data[r * x.stride + k] = poison<T>();
    }
  }

  int64_t floats = 0;
  CHECK(cuda::multi_sample_linear_workspace(product, s.m, s.n, s.k, s.samples, c.col_offset,
                                            &floats) == cudaSuccess,
        what.str());
  const int64_t rows = product == Product::kWgrad ? s.n : s.m,
                cols = product == Product::kForward ? s.n : s.k,
                outputs = product == Product::kForward ? s.samples : 1;
  const auto out = check::reproducible(what.str(), [&] {
    std::vector<T> y(outputs * rows * cols, poison<T>());
    std::vector<float> workspace(floats, std::numeric_limits<float>::quiet_NaN());
    cuda::DropoutLinearArgs<T> a{};
    a.m = s.m, a.n = s.n, a.k = s.k, a.samples = s.samples;
    a.out = y.data(), a.workspace = workspace.data();
    a.x = x.data.data(), a.weight = w.data.data(), a.grad = g.data.data();
    a.x_stride = x.stride, a.weight_stride = w.stride, a.grad_stride = g.stride;
    a.grad_sample_stride = g_rows * g.stride;
    a.bias = with_bias ? bias.data.data() : nullptr;
    a.stream = streams[0].mask, a.rate = streams[0].rate;
    CHECK(cuda::launch_multi_sample_linear(product, a, nullptr) == cudaSuccess, what.str());
    return y;
  });

  for (int64_t i = 0; i < outputs * rows * cols; ++i) {
    const int64_t sample = i / (rows * cols), r = i / cols % rows, col = i % cols;
    double sum = 0.0, size = 0.0;  // of the terms, for the rounding of the fp32 sum
    const auto term = [&](double a, double b, double scale) {
      if (scale != 0.0) sum += a * b * scale, size += std::abs(a * b * scale);
    };
    if (product == Product::kForward) {
      for (int64_t k = 0; k < s.k; ++k) term(x.at(r, k), w.at(col, k), mask(sample, r, k));
      if (with_bias) term(bias.at(0, col), 1.0, 1.0);
    } else {
      for (int64_t m = 0; m < s.samples; ++m) {
        if (product == Product::kDgrad) {
          for (int64_t n = 0; n < s.n; ++n)
            term(g.at(m * g_rows + r, n), w.at(n, col), mask(m, r, col));
        } else {
          for (int64_t b = 0; b < s.m; ++b)
            term(g.at(m * g_rows + b, r), x.at(b, col), mask(m, b, col));
        }
      }
    }
    const float got = to_float(out[i]);
    CHECK(near<T>(got, sum, 2e-6 * size), what.str() << " at (" << sample << "," << r << "," << col
                                                     << "): got " << got << ", expected " << sum);
  }
}

template <class T>
void run_all(const char* dtype, const Shape& s, const StreamCase& c, bool with_bias) {
  for (const Product product : {Product::kForward, Product::kDgrad, Product::kWgrad}) {
    run<T>(dtype, product, s, c, with_bias);
  }
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  using randfuse::bfloat16_t, randfuse::half_t;
  // Each compiled width with aligned and with element-wise loads; groups of samples that are full,
  // partly full and several; columns in one slice and in several, the last ones short or empty.
  run_all<bfloat16_t>("bfloat16", {5, 20, 6, 264, 0}, kStreamCases[0], true);
  run_all<half_t>("half", {9, 18, 16, 45, 3}, kStreamCases[2], false);
  run_all<half_t>("half", {3, 40, 24, 136, 8}, kStreamCases[1], true);
  run_all<bfloat16_t>("bfloat16", {3, 18, 61, 67, 1}, kStreamCases[4], true);
  run_all<bfloat16_t>("bfloat16", {2, 34, 128, 72, 0}, kStreamCases[3], true);
  for (const StreamCase& c : kStreamCases)
    run_all<bfloat16_t>("bfloat16", {2, 6, 5, 24, 0}, c, true);
  run_all<half_t>("half", {1, 1, 1, 1, 0}, kStreamCases[0], true);
  // As many blocks as run at once, so that columns are not cut; wgrad in several splits.
  run<half_t>("half", randfuse::cuda::Product::kForward, {9, 400, 16, 40, 0}, kStreamCases[0],
              true);
  run<bfloat16_t>("bfloat16", randfuse::cuda::Product::kWgrad, {4, 200, 8, 40, 0}, kStreamCases[3],
                  false);
  return check::report("test_cuda_multi_sample_linear");
}
