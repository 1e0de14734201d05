// The elementwise pass of linear_dropout and its derivative on the SIMT executor.
#include "../kernels/cuda/linear_dropout.h"

#include "cuda_cases.h"

namespace randfuse::test {
namespace {

using cuda::Activation;

double act(Activation a, double z) {
  switch (a) {
    case Activation::kRelu:
      return z > 0 ? z : 0;
    case Activation::kGelu:
      return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::kSilu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

double times_derivative(Activation a, double grad, double z) {  // kinks apart, central differences
  if (a == Activation::kRelu) return z <= 0 ? 0 : grad;
  return grad * (act(a, z + 1e-5) - act(a, z - 1e-5)) / 2e-5;
}

template <class T>
void run(const char* dtype, bool derivative, Activation activation, bool with_other, int64_t rows,
         int64_t cols, int64_t pad, const StreamCase& c) {
  std::ostringstream what;
  what << (derivative ? "act_dropout_grad " : "act_dropout ") << dtype << " activation "
       << static_cast<int>(activation) << " (" << rows << "," << cols << ") " << c;
  const Stream stream(c, rows, Op::kOutputDropout);
  Matrix<T> z(rows, cols, cols + pad, 1);
  const Matrix<T> other(rows, cols, cols, 2);
  for (int64_t i = 0; i < rows * cols; i += 3) {  // a dropped NaN leaves no trace
    const int64_t r = i / cols, col = i % cols;
    if (!stream.keep(r, col)) z.data[r * z.stride + col] = poison<T>();
  }
  const auto out = check::reproducible(what.str(), [&] {
    std::vector<T> y(rows * cols, poison<T>());
    const cuda::ActDropoutArgs<T> args{z.data.data(), with_other ? other.data.data() : nullptr,
                                       y.data(),      rows,
                                       cols,          z.stride,
                                       other.stride,  activation,
                                       stream.mask,   stream.rate};
    CHECK((derivative ? cuda::launch_act_dropout_grad(args, nullptr)
                      : cuda::launch_act_dropout(args, nullptr)) == cudaSuccess,
          what.str());
    return y;
  });
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t col = 0; col < cols; ++col) {
      const bool keep = stream.keep(r, col);
      const double v = z.at(r, col), o = with_other ? other.at(r, col) : 0.0;
      const double expected =
          derivative ? (keep ? times_derivative(activation, o * stream.scale(), v) : 0.0)
                     : o + (keep ? act(activation, v) * stream.scale() : 0.0);
      const float got = to_float(out[r * cols + col]);
      CHECK(near<T>(got, expected, 2e-6 * (1 + stream.scale())),
            what.str() << " at (" << r << "," << col << "): got " << got << ", expected "
                       << expected);
    }
  }
}

// relu'(z) selects: of 1 and inf, z <= 0 drops both and a NaN z passes both, where kept.
template <class T>
void test_relu_selects() {
  constexpr float inf = std::numeric_limits<float>::infinity();
  constexpr int64_t kCols = 64;
  const Stream stream(kStreamCases[0], 1, Op::kOutputDropout);
  const float zs[] = {-1.0f, 0.0f, 1.0f, std::numeric_limits<float>::quiet_NaN()};
  std::vector<T> z(kCols), grad(kCols), dz(kCols);
  for (int64_t c = 0; c < kCols; ++c) {
    z[c] = from_float<T>(zs[c % 4]);
    grad[c] = from_float<T>(c / 4 % 2 ? inf : 1.0f);
  }
  const cuda::ActDropoutArgs<T> args{z.data(),    grad.data(), dz.data(), 1,
                                     kCols,       kCols,       kCols,     Activation::kRelu,
                                     stream.mask, stream.rate};
  CHECK(cuda::launch_act_dropout_grad(args, nullptr) == cudaSuccess, "relu derivative");
  for (int64_t c = 0; c < kCols; ++c) {
    const bool pass = stream.keep(0, c) && c % 4 >= 2;
    const float g = to_float(grad[c]) * static_cast<float>(stream.scale());
    const float expected = pass ? to_float(from_float<T>(g)) : 0.0f, got = to_float(dz[c]);
    CHECK(got == expected, "relu derivative at z = " << zs[c % 4]
                                                     << ", grad = " << to_float(grad[c]) << ": got "
                                                     << got << ", expected " << expected);
  }
}

// out may be z, as linear_dropout has it when nothing saves the pre-activation.
template <class T>
void test_in_place(int64_t cols) {
  const Stream stream(kStreamCases[3], 6, Op::kOutputDropout);
  const Matrix<T> residual(6, cols, cols, 2);
  const auto run = [&](bool in_place) {
    Matrix<T> z(6, cols, cols, 1);
    std::vector<T> y(in_place ? 0 : 6 * cols, poison<T>());
    std::vector<T>& out = in_place ? z.data : y;
    const cuda::ActDropoutArgs<T> args{
        z.data.data(), residual.data.data(), out.data(),  6,          cols, cols,
        cols,          Activation::kGelu,    stream.mask, stream.rate};
    CHECK(cuda::launch_act_dropout(args, nullptr) == cudaSuccess, "act_dropout in place");
    return out;
  };
  const std::vector<T> expected = run(false), got = run(true);
  CHECK(std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)) == 0,
        "act_dropout into z itself must give the same bits, " << cols << " columns");
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  using randfuse::half_t;
  for_each_dtype([](auto type, const char* dtype) {
    using T = decltype(type);
    for (const Activation a :
         {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kSilu}) {
      for (const bool derivative : {false, true}) {
        run<T>(dtype, derivative, a, true, 4, 40, 0, kStreamCases[0]);
        run<T>(dtype, derivative, a, true, 6, 13, 2, kStreamCases[4]);
      }
      run<T>(dtype, false, a, false, 4, 24, 8, kStreamCases[1]);
    }
    test_relu_selects<T>();
    test_in_place<T>(40);
    test_in_place<T>(13);
  });
  for (const StreamCase& c : kStreamCases) {
    run<half_t>("half", false, Activation::kGelu, true, 4, 40, 0, c);
    run<half_t>("half", true, Activation::kSilu, true, 4, 40, 0, c);
  }
  run<half_t>("half", false, Activation::kRelu, true, 300, 136, 0,
              kStreamCases[3]);  // cursors carry
  run<float>("float", false, Activation::kRelu, true, 0, 8, 0, kStreamCases[0]);
  return check::report("test_cuda_linear_dropout");
}
