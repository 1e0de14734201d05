// dropout and dropout_mask on the SIMT executor, against the definition.
#include "../kernels/cuda/dropout.h"

#include <memory>

#include "cuda_cases.h"

namespace randfuse::test {
namespace {

template <class T>
void test_dropout(const char* dtype, int64_t rows, int64_t cols, int64_t stride,
                  const StreamCase& c) {
  std::ostringstream what;
  what << "dropout " << dtype << " (" << rows << "," << cols << ") stride " << stride << " " << c;
  const Stream stream(c, rows, Op::kDropout, 3);
  Matrix<T> x(rows, cols, stride, 1);
  for (int64_t r = 0; r < rows; ++r) {  // a dropped NaN must give 0
    for (int64_t col = 0; col < cols; ++col) {
      if (!stream.keep(r, col) && (r + col) % 3 == 0) x.data[r * stride + col] = poison<T>();
    }
  }
  const auto y = check::reproducible(what.str(), [&] {
    std::vector<T> out(rows * cols, poison<T>());
    const cuda::DropoutArgs<T> args{x.data.data(), out.data(),  rows,       cols,
                                    stride,        stream.mask, stream.rate};
    CHECK(cuda::launch_dropout(args, nullptr) == cudaSuccess, what.str());
    return out;
  });
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t col = 0; col < cols; ++col) {
      const float scaled = static_cast<float>(stream.scale()) * x.at(r, col);
      const T expected = from_float<T>(stream.keep(r, col) ? scaled : 0.0f);
      CHECK(std::memcmp(&expected, &y[r * cols + col], sizeof(T)) == 0,
            what.str() << " at (" << r << "," << col << ")");
    }
  }
}

void test_mask(int64_t rows, int64_t cols, const StreamCase& c) {
  std::ostringstream what;
  what << "dropout_mask (" << rows << "," << cols << ") " << c;
  const Stream stream(c, rows, Op::kDropout);
  const auto mask = check::reproducible(what.str(), [&] {
    std::vector<unsigned char> out(rows * cols, 0x55);
    const cuda::DropoutMaskArgs args{reinterpret_cast<bool*>(out.data()), rows, cols, stream.mask,
                                     stream.rate};
    CHECK(cuda::launch_dropout_mask(args, nullptr) == cudaSuccess, what.str());
    return out;
  });
  for (int64_t i = 0; i < rows * cols; ++i) {
    CHECK(mask[i] == stream.keep(i / cols, i % cols),
          what.str() << " at " << i << ", got " << int{mask[i]});
  }
}

void test_hundred_million_decisions() {
  const int64_t rows = 8000, cols = 12500;
  const Stream stream({1, 0, 3, 0.1, false}, rows, Op::kDropout);
  const std::unique_ptr<bool[]> mask(new bool[rows * cols]);
  launch_dropout_mask(cuda::DropoutMaskArgs{mask.get(), rows, cols, stream.mask, stream.rate},
                      nullptr);
  int64_t different = 0;
  for (int64_t i = 0; i < rows * cols; ++i) different += mask[i] != stream.keep(i / cols, i % cols);
  CHECK(different == 0, different << " of " << rows * cols << " decisions differ");
}

void test_in_place() {
  const Stream stream(kStreamCases[0], 6, Op::kDropout);
  const Matrix<half_t> x(6, 40, 40, 2);
  std::vector<half_t> apart(240), in_place = x.data;
  launch_dropout(
      cuda::DropoutArgs<half_t>{x.data.data(), apart.data(), 6, 40, 40, stream.mask, stream.rate},
      nullptr);
  launch_dropout(cuda::DropoutArgs<half_t>{in_place.data(), in_place.data(), 6, 40, 40, stream.mask,
                                           stream.rate},
                 nullptr);
  CHECK(std::memcmp(apart.data(), in_place.data(), 480) == 0, "dropout in place");
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  for (const StreamCase& c : kStreamCases) {
    for_each_dtype([&](auto type, const char* dtype) {
      using T = decltype(type);
      test_dropout<T>(dtype, 4, 64, 64, c);
      test_dropout<T>(dtype, 6, 24, 32, c);
      test_dropout<T>(dtype, 2, 13, 15, c);
    });
    test_mask(4, 72, c);
    test_mask(2, 5, c);
  }
  // Several strides of the grid (3 multiprocessors, 3072 threads), so that cursors carry.
  test_dropout<randfuse::bfloat16_t>("bfloat16", 70, 1016, 1016, kStreamCases[3]);
  test_dropout<float>("float", 4000, 9, 9, kStreamCases[4]);
  test_dropout<float>("float", 0, 8, 8, kStreamCases[0]);
  test_dropout<float>("float", 8, 0, 0, kStreamCases[0]);
  test_dropout<float>("float", 1, 1, 1, kStreamCases[0]);
  test_in_place();
  test_hundred_million_decisions();
  return check::report("test_cuda_dropout");
}
