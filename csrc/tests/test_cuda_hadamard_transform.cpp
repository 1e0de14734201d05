// hadamard_transform on the SIMT executor: every bit, against the plain butterfly.
#include "../kernels/cuda/hadamard_transform.h"

#include "../kernels/cuda/hadamard_transform.cuh"
#include "cuda_cases.h"

namespace randfuse::test {
namespace {

// Level by level along the middle of (outer, n, inner), in fp32.
void butterfly(std::vector<float>& x, int64_t outer, int64_t n, int64_t inner) {
  for (int64_t h = 1; h < n; h *= 2) {
    for (int64_t i = 0; i < outer * n; ++i) {
      if (i % n & h) continue;
      for (int64_t c = 0; c < inner; ++c) {
        float &a = x[i * inner + c], &b = x[(i + h) * inner + c];
        const float sum = a + b, difference = a - b;
        a = sum, b = difference;
      }
    }
  }
}

// As the binding does it: one pass or two, with fp32 in between. `shift` elements misalign x.
template <class T>
void run(const char* dtype, int64_t outer, int64_t n, int64_t inner, int64_t shift = 0) {
  std::ostringstream what;
  what << dtype << " (" << outer << "," << n << "," << inner << ") shift=" << shift;
  const float scale = 0.3f;
  const int64_t count = outer * n * inner, first = cuda::hadamard_first_pass(n, inner);
  const Matrix<T> x(1, count + shift, count + shift, 1);
  std::vector<float> expected(count);
  for (int64_t i = 0; i < count; ++i) expected[i] = x.at(0, shift + i);
  butterfly(expected, outer, n, inner);
  const auto y = check::reproducible(what.str(), [&] {
    std::vector<T> out(count, poison<T>());
    const T* from = x.data.data() + shift;
    if (first == n) {
      const cuda::HadamardArgs<T, T> all{from, out.data(), outer, n, inner, scale};
      CHECK(cuda::launch_hadamard_pass(all, nullptr) == cudaSuccess, what.str());
    } else {
      std::vector<float> sums(count, poison<float>());
      const cuda::HadamardArgs<T, float> low{from,  sums.data(), outer * (n / first),
                                             first, inner,       1};
      const cuda::HadamardArgs<float, T> high{sums.data(), out.data(),    outer,
                                              n / first,   first * inner, scale};
      CHECK(cuda::launch_hadamard_pass(low, nullptr) == cudaSuccess, what.str());
      CHECK(cuda::launch_hadamard_pass(high, nullptr) == cudaSuccess, what.str());
    }
    return out;
  });
  for (int64_t i = 0; i < count; ++i) {
    const T value = from_float<T>(expected[i] * scale);
    CHECK(std::memcmp(&y[i], &value, sizeof(T)) == 0, what.str() << " at " << i << ": got "
                                                                 << to_float(y[i]) << ", expected "
                                                                 << to_float(value));
  }
}

// The 32 lanes of a warp that differ in `lane_bits` of the tile index must hit 32 banks.
void test_banks(const char* what, std::vector<int> lane_bits) {
  uint32_t banks = 0;
  for (int lane = 0; lane < 32; ++lane) {
    int i = 0;
    for (int b = 0; b < 5; ++b) i |= (lane >> b & 1) << lane_bits[b];
    banks |= 1u << cuda::padded(i) % 32;
  }
  CHECK(banks == ~0u, what << ": banks " << std::hex << banks);
}

void test_in_place_and_refusals() {
  const Matrix<float> x(1, 1 << 10, 1 << 10, 3);
  std::vector<float> apart(1 << 10), in_place = x.data;
  cuda::launch_hadamard_pass(
      cuda::HadamardArgs<float, float>{x.data.data(), apart.data(), 4, 256, 1, 1}, nullptr);
  float* const y = in_place.data();
  cuda::launch_hadamard_pass(cuda::HadamardArgs<float, float>{y, y, 4, 256, 1, 1}, nullptr);
  CHECK(in_place == apart, "in place");
  for (const auto& [n, inner] : {std::pair<int64_t, int64_t>{12, 1}, {1 << 16, 1}, {64, 4}}) {
    const cuda::HadamardArgs<float, float> args{y, y, 1, n, inner, 1};
    CHECK(cuda::launch_hadamard_pass(args, nullptr) == cudaErrorInvalidValue,
          "n=" << n << " inner=" << inner << " must be refused");
  }
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  for_each_dtype([](auto type, const char* name) {
    using T = decltype(type);
    for (int64_t n = 1; n <= 1024; n *= 2) run<T>(name, 3, n, 1, n == 8);  // few: small tiles
    run<T>(name, 1000, 64, 1);                                             // many: large ones
    run<T>(name, 7, 8192, 1);
    run<T>(name, 3, 1 << 14, 1);
    run<T>(name, 1, 1 << 15, 1, 3);
    run<T>(name, 2, 256, 40);  // strided, 4 columns to a row of a small tile
    run<T>(name, 1, 64, 8);
    run<T>(name, 3, 2, 1001);
    run<T>(name, 2, 1024, 37);
    run<T>(name, 1, 4096, 9);
    run<T>(name, 1, 8192, 16);    // two strided passes
    run<T>(name, 1, 1 << 16, 1);  // two passes, the first contiguous
    run<T>(name, 0, 64, 1);
  });
  test_banks("packs", {3, 4, 5, 6, 7});
  test_banks("window at bit 3", {0, 1, 2, 8, 9});
  test_banks("later windows", {0, 1, 2, 3, 4});
  test_in_place_and_refusals();
  return check::report("test_cuda_hadamard_transform");
}
