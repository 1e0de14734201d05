// The SIMT executor itself: what it computes, and that it catches what it is there to catch.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <random>
#include <stdexcept>

#include "../kernels/cuda/device.cuh"
#include "check.h"

namespace randfuse::test {
namespace {

using cuda::launch;

// Each thread writes its slot and reads its neighbour's.
template <bool kBarrier>
__global__ void neighbour_kernel(int* out) {
  RF_SHARED(int, slots, 0, 64);
  slots[threadIdx.x] = static_cast<int>(threadIdx.x);
  if constexpr (kBarrier) __syncthreads();
  out[threadIdx.x] = slots[(threadIdx.x + 33) % 64];
}

template <bool kBarrier>
std::vector<std::vector<int>> neighbours() {
  std::vector<std::vector<int>> results;
  for (simt::seed = 1; simt::seed <= 3; ++simt::seed) {
    results.emplace_back(64);
    launch(neighbour_kernel<kBarrier>, 1, 64, 64 * sizeof(int), nullptr, results.back().data());
  }
  return results;
}

void test_missing_barrier() {
  const auto with = neighbours<true>(), without = neighbours<false>();
  for (int t = 0; t < 64; ++t)
    CHECK(with[0][t] == (t + 33) % 64, "thread " << t << " got " << with[0][t]);
  CHECK(with[0] == with[1] && with[1] == with[2], "a barrier must make the order irrelevant");
  CHECK(without[0] != without[1] || without[1] != without[2], "a missing barrier must show");
}

__global__ void exited_kernel() {
  if (threadIdx.x >= 48) return;
  __syncthreads();
}
__global__ void two_sites_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void diverged_warp_kernel() {
  if (threadIdx.x % 2) __syncwarp();
}

void test_refused(void (*kernel)(), const std::string& expected, int threads = 64,
                  size_t shared = 512) {
  std::string message = "no error";
  try {
    launch(kernel, 1, threads, shared, nullptr);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(message.find(expected) != std::string::npos,
        "expected '" << expected << "', got '" << message << "'");
}

__global__ void misaligned_copy_kernel() {
  RF_SHARED(char, staged, 0, 64);
  alignas(16) static const char source[32] = {};
  cuda::cp_async_16(staged, source + 8, true);
}
__global__ void empty_kernel() {}

__global__ void overrun_kernel(int index) {
  RF_SHARED(int, first, 0, 32);
  RF_SHARED(int, second, 128, 32);  // right behind it on a GPU
  second[threadIdx.x] = 0;
  first[index + threadIdx.x] = 1;
}

void test_out_of_bounds() {
  int channel[2];
  CHECK(pipe(channel) == 0, "pipe");
  const pid_t child = fork();
  if (child == 0) {
    dup2(channel[1], STDERR_FILENO);
    launch(overrun_kernel, 1, 32, 256, nullptr, 1);
    _exit(0);
  }
  close(channel[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(channel[0], buffer, sizeof buffer)) > 0;) text.append(buffer, n);
  close(channel[0]);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(status != 0 && text.find("heap-buffer-overflow") != std::string::npos,
        "AddressSanitizer said: " << text);
}

__global__ void copy_kernel(const float* in, float* out, bool wait) {
  RF_SHARED(float, staged, 0, 4 * 32);
  float* mine = staged + 4 * threadIdx.x;
  cuda::cp_async_16(mine, in + 4 * threadIdx.x, threadIdx.x != 31);
  cuda::cp_async_commit();
  cuda::cp_async_16(mine, in, false);  // a later group, never waited for by wait<1>
  cuda::cp_async_commit();
  if (wait) cuda::cp_async_wait<0>();
  out[threadIdx.x] = mine[1];
}

void test_async_copy() {
  std::vector<float> in(128, 1.0f), waited(32), unwaited(32);
  launch(copy_kernel, 1, 32, 512, nullptr, in.data(), waited.data(), true);
  launch(copy_kernel, 1, 32, 512, nullptr, in.data(), unwaited.data(), false);
  CHECK(waited[0] == 0.0f && waited[31] == 0.0f,
        "the last group wins, and zeros where out of range");
  CHECK(std::isnan(unwaited[0]), "a copy that nobody waits for must not be readable");
}

__global__ void collectives_kernel(uint32_t* out, int* count) {
  const uint32_t t = threadIdx.x;
  uint32_t sum = t;
  for (int flip = 1; flip < 32; flip *= 2) sum += __shfl_xor_sync(~0u, sum, flip);
  out[t] = sum * 1000 + __shfl_sync(~0u, t, 5);
  out[32 + t] = __ballot_sync(~0u, t % 3 == 0);
  atomicAdd(count, 1);
}

void test_collectives() {
  std::vector<uint32_t> out(64);
  int count = 0;
  launch(collectives_kernel, 2, 32, 0, nullptr, out.data(), &count);
  for (int t = 0; t < 32; ++t) {
    CHECK(out[t] == 496005 && out[32 + t] == 0x49249249u,
          "thread " << t << ": " << out[t] << " " << out[32 + t]);
  }
  CHECK(count == 64, "atomicAdd counted " << count);
}

// One warp multiplies (16,16) by (16,8) with fragments filled as the PTX manual says.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](T low, T high) { return low.bits | uint32_t{high.bits} << 16; };
  uint32_t af[4], bf[2];
  for (int i = 0; i < 4; ++i) {
    const T* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    af[i] = pair(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const T* at = b + (2 * t + 8 * i) * 8 + g;
    bf[i] = pair(at[0], at[8]);
  }
  float cf[4] = {1, 1, 1, 1};
  cuda::mma_m16n8k16<T>(cf, af, bf[0], bf[1]);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = cf[i];
}

template <class T>
void test_mma() {
  std::mt19937 bits(1);
  std::vector<T> a(256), b(128);
  const auto fill = [&](std::vector<T>& m) {  // small integers: exact in any order of summation
    for (T& v : m) v = from_float<T>(static_cast<float>(bits() % 17) - 8.0f);
  };
  fill(a), fill(b);
  std::vector<float> c(128);
  launch(mma_kernel<T>, 1, 32, 0, nullptr, a.data(), b.data(), c.data());
  for (int i = 0; i < 128; ++i) {
    float expected = 1;
    for (int k = 0; k < 16; ++k)
      expected += to_float(a[i / 8 * 16 + k]) * to_float(b[k * 8 + i % 8]);
    CHECK(c[i] == expected,
          "mma at (" << i / 8 << "," << i % 8 << "): " << c[i] << " != " << expected);
  }
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  test_missing_barrier();
  test_refused(exited_kernel, "16 threads have exited");
  test_refused(exited_kernel, "48 threads wait at __syncthreads");
  test_refused(two_sites_kernel, "32 threads wait at __syncthreads");
  test_refused(diverged_warp_kernel, "32 threads wait at warp collective");
  test_refused(misaligned_copy_kernel, "aligned to 16 bytes");
  test_refused(empty_kernel, "1024 threads", 1056);
  test_refused(empty_kernel, "227 KB", 64, (227 << 10) + 16);
  test_refused(empty_kernel, "no error", 1024, 227 << 10);
  test_out_of_bounds();
  test_async_copy();
  test_collectives();
  test_mma<randfuse::half_t>();
  test_mma<randfuse::bfloat16_t>();
  return check::report("test_simt");
}
