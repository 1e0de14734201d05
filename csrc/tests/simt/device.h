// The host half of kernels/cuda/device.cuh: CUDA's vocabulary on the executor.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "cuda_runtime_api.h"
#include "executor.h"

#define __global__
#define RF_DEVICE inline
#define __launch_bounds__(...)

#define threadIdx (::simt::thread_index)
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_size)
#define gridDim (::simt::grid_size)

#define RF_SHARED(T, name, offset, count) \
  T* const name = static_cast<T*>(::simt::shared_array(offset, (count) * sizeof(T), alignof(T)))

using std::max, std::min;
#define RF_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(RF_SITE) { simt::block_barrier(file, line); }
inline void __syncwarp(unsigned = ~0u, RF_SITE) { simt::warp_exchange(nullptr, 0, file, line); }
inline uint32_t __shfl_xor_sync(unsigned, uint32_t v, int flip, int = 32, RF_SITE) {
  return simt::warp_exchange(&v, 1, file, line).lane[threadIdx.x % 32 ^ flip][0];
}
inline uint32_t __shfl_sync(unsigned, uint32_t v, int source, int = 32, RF_SITE) {
  return simt::warp_exchange(&v, 1, file, line).lane[source][0];
}
inline uint32_t __ballot_sync(unsigned, bool predicate, RF_SITE) {
  const uint32_t v = predicate;
  const simt::Exchange& all = simt::warp_exchange(&v, 1, file, line);
  uint32_t votes = 0;
  for (int l = 0; l < 32; ++l) votes |= all.lane[l][0] << l;
  return votes;
}
template <class T>
T atomicAdd(T* p, T v) {  // fibers switch only at collectives
  return std::exchange(*p, *p + v);
}
template <class T>
T atomicMax(T* p, T v) {
  return std::exchange(*p, std::max(*p, v));
}
inline void __threadfence() {}

namespace randfuse::cuda {

inline void cp_async_16(void* shared, const void* global, bool in_range) {
  simt::async_copy_16(shared, global, in_range);
}
inline void cp_async_commit() { simt::async_commit(); }
template <int kPending>
void cp_async_wait() {
  simt::async_wait(kPending);
}
inline void store_words(void* to, const Words& v) { *static_cast<Words*>(to) = v; }
inline int64_t load_constant(const int64_t* p) { return *p; }
inline float exp2_approx(float x) { return std::exp2(x); }

template <class T>
void unpack2(uint32_t word, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(word)});
  high = to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// Fragment layout of the PTX manual, g = lane / 4 and t = lane % 4:
//   A (16,16): a0 (g, 2t) a1 (g+8, 2t) a2 (g, 2t+8) a3 (g+8, 2t+8), each with its right neighbour
//   B (16, 8): b0 (2t, g) b1 (2t+8, g), each with the one below
//   C (16, 8): c0 (g, 2t) c2 (g+8, 2t), each followed by its right neighbour
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, RF_SITE) {
  uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const simt::Exchange& all = simt::warp_exchange(words, 6, file, line);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int pair = 0; pair < 8; ++pair) {  // columns 2 pair, 2 pair + 1 of A
    const int owner = pair % 4, right = pair / 4;
    float b[2][2], x[2][2];
    for (int e = 0; e < 2; ++e) {
      unpack2<T>(all.lane[(2 * t + e) * 4 + owner][4 + right], b[e][0], b[e][1]);
      unpack2<T>(all.lane[g * 4 + owner][2 * right + e], x[e][0], x[e][1]);
    }
    for (int e = 0; e < 4; ++e) c[e] += x[e / 2][0] * b[e % 2][0] + x[e / 2][1] * b[e % 2][1];
  }
}

inline cudaError_t multiprocessor_count(int* n) { return *n = simt::multiprocessors, cudaSuccess; }

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t, const Args&... args) {
  simt::run_grid(blocks, threads, shared_bytes, [&] { kernel(args...); });
  return cudaSuccess;
}

}  // namespace randfuse::cuda
