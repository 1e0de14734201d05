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

double act_derivative(Activation a, double z) {  // kinks apart, by central differences
  if (a == Activation::kRelu) return z > 0;
  return (act(a, z + 1e-5) - act(a, z - 1e-5)) / 2e-5;
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
          derivative ? (keep ? o * stream.scale() * act_derivative(activation, v) : 0.0)
                     : o + (keep ? act(activation, v) * stream.scale() : 0.0);
      const float got = to_float(out[r * cols + col]);
      CHECK(near<T>(got, expected, 2e-6 * (1 + stream.scale())),
            what.str() << " at (" << r << "," << col << "): got " << got << ", expected "
                       << expected);
    }
  }
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
