// The three products of dropout_linear on the SIMT executor, against loops over the definition.
#include "../kernels/cuda/dropout_linear.h"

#include "cuda_cases.h"

namespace randfuse::test {
namespace {

using cuda::Product;

struct Shape {
  int64_t m, n, k;
  int64_t pad;  // extra elements between rows of every operand
};

template <class T>
void run(const char* dtype, Product product, const Shape& s, const StreamCase& c, bool with_bias) {
  std::ostringstream what;
  const char* names[] = {"forward", "dgrad", "wgrad"};
  what << names[static_cast<int>(product)] << " " << dtype << " M=" << s.m << " N=" << s.n
       << " K=" << s.k << " pad=" << s.pad << " " << c << (with_bias ? " with bias" : "");
  const Stream stream(c, s.m, Op::kDropout);
  Matrix<T> x(s.m, s.k, s.k + s.pad, 1), w(s.n, s.k, s.k + s.pad, 2), g(s.m, s.n, s.n + s.pad, 3);
  const Matrix<T> bias(1, s.n, s.n, 4);
  for (int64_t r = 0; r < s.m; ++r) {
    for (int64_t k = 0; k < s.k; ++k) {
      if (!stream.keep(r, k) && (r * 7 + k) % 5 == 0) x.data[r * x.stride + k] = poison<T>();
    }
  }
  const int64_t rows = product == Product::kWgrad ? s.n : s.m,
                cols = product == Product::kForward ? s.n : s.k;
  int64_t floats = 0;
  CHECK(cuda::dropout_linear_workspace(product, s.m, s.n, s.k, 1, c.col_offset, &floats) ==
            cudaSuccess,
        what.str());
  const auto out = check::reproducible(what.str(), [&] {
    std::vector<T> y(rows * cols, poison<T>());
    std::vector<float> workspace(floats, std::numeric_limits<float>::quiet_NaN());
    cuda::DropoutLinearArgs<T> a{};
    a.m = s.m, a.n = s.n, a.k = s.k, a.out = y.data(), a.workspace = workspace.data();
    a.x = x.data.data(), a.weight = w.data.data(), a.grad = g.data.data();
    a.x_stride = x.stride, a.weight_stride = w.stride, a.grad_stride = g.stride;
    a.bias = with_bias ? bias.data.data() : nullptr;
    a.stream = stream.mask, a.rate = stream.rate;
    CHECK(cuda::launch_dropout_linear(product, a, nullptr) == cudaSuccess, what.str());
    return y;
  });
  // dropped(r, k): the masked operand, where keep is drawn once for all
  std::vector<double> kept(s.m * s.k);
  for (int64_t i = 0; i < s.m * s.k; ++i)
    kept[i] = stream.keep(i / s.k, i % s.k) ? stream.scale() : 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t col = 0; col < cols; ++col) {
      double sum = 0.0, size = 0.0;  // of the terms, for the rounding of the fp32 sum
      const auto term = [&](double a, double b, double scale) {
        if (scale != 0.0) sum += a * b * scale, size += std::abs(a * b * scale);
      };
      if (product == Product::kForward) {
        for (int64_t k = 0; k < s.k; ++k) term(x.at(r, k), w.at(col, k), kept[r * s.k + k]);
        if (with_bias) term(bias.at(0, col), 1.0, 1.0);
      } else if (product == Product::kDgrad) {
        for (int64_t n = 0; n < s.n; ++n) term(g.at(r, n), w.at(n, col), kept[r * s.k + col]);
      } else {
        for (int64_t m = 0; m < s.m; ++m) term(g.at(m, r), x.at(m, col), kept[m * s.k + col]);
      }
      const float got = to_float(out[r * cols + col]);
      CHECK(near<T>(got, sum, 2e-6 * size),
            what.str() << " at (" << r << "," << col << "): got " << got << ", expected " << sum);
    }
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
  // Each compiled width with aligned and with element-wise loads, tiles crossed in every direction.
  run_all<half_t>("half", {40, 16, 72, 8}, kStreamCases[0], true);
  run_all<bfloat16_t>("bfloat16", {150, 10, 300, 0}, kStreamCases[1], false);
  run_all<bfloat16_t>("bfloat16", {34, 40, 136, 0}, kStreamCases[3], true);
  run_all<half_t>("half", {18, 64, 45, 3}, kStreamCases[2], false);
  run_all<half_t>("half", {40, 128, 264, 0}, kStreamCases[3], true);
  run_all<bfloat16_t>("bfloat16", {22, 100, 67, 1}, kStreamCases[4], true);
  for (const StreamCase& c : kStreamCases) run_all<bfloat16_t>("bfloat16", {6, 5, 24, 0}, c, true);
  run_all<half_t>("half", {1, 1, 1, 0}, kStreamCases[0], true);
  // Long enough to be split: K in the forward product, M in wgrad.
  run<bfloat16_t>("bfloat16", randfuse::cuda::Product::kForward, {20, 12, 1100, 0}, kStreamCases[2],
                  true);
  run<half_t>("half", randfuse::cuda::Product::kForward, {4, 70, 1200, 0}, kStreamCases[3], true);
  run<half_t>("half", randfuse::cuda::Product::kWgrad, {1040, 8, 40, 0}, kStreamCases[3], false);
  return check::report("test_cuda_dropout_linear");
}
