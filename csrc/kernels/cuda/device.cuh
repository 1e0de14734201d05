// Everything that a kernel of this folder needs from its compiler, so that kernels contain no
// #ifdef: nvcc maps it to intrinsics and inline PTX (sm_80 and later), the C++ compiler to the SIMT
// executor of csrc/tests/simt, which runs the same text without a GPU.
//
//   RF_SHARED(T, name, offset, count)     array in dynamic shared memory, offset in bytes
//   cp_async_16(shared, global, ok)       16 bytes, zeros unless ok
//   cp_async_commit(), cp_async_wait<n>   close a group; wait until at most n groups are pending
//   store_words(to, words)                one 16-byte store to global memory
//   load_constant(p)                      of memory that nothing writes meanwhile
//   unpack2<T>, pack2<T>                  two 16-bit floats in a word, the lower column low
//   exp2_approx(x)                        2^x within 2^-22, zero instead of subnormal
//   mma_m16n8k16<T>(c, a, b0, b1)         c (16,8) fp32 += a (16,16) b (16,8) across a warp
//   launch(kernel, blocks, threads, ...)  with the status of the launch
#pragma once
#include "../common/dtype.h"
#include "../common/streams.h"
#include "rate.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define RF_DEVICE __device__ __forceinline__
#define RF_SHARED(T, name, offset, count)                    \
  extern __shared__ __align__(16) unsigned char rf_shared[]; \
  static_assert((offset) % alignof(T) == 0, "misaligned");   \
  T* const name = reinterpret_cast<T*>(rf_shared + (offset))

namespace randfuse::cuda {

RF_DEVICE void cp_async_16(void* shared, const void* global, bool in_range) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  // .cg goes past L1: the data is used once per block. A source size of 0 writes zeros.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(in_range ? 16 : 0)
               : "memory");
}
RF_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
RF_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// In PTX, for the compiler makes four 4-byte stores of an assignment. For global memory.
RF_DEVICE void store_words(void* to, const Words& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(v.r[0]), "r"(v.r[1]), "r"(v.r[2]), "r"(v.r[3])
               : "memory");
}

// Of memory that nothing writes while the kernel runs: may be moved across stores.
RF_DEVICE int64_t load_constant(const int64_t* p) {
  return __ldg(reinterpret_cast<const long long*>(p));
}

RF_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
RF_DEVICE void unpack2(uint32_t word, float& low, float& high);
template <>
RF_DEVICE void unpack2<bfloat16_t>(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xFFFF0000u);
}
template <>
RF_DEVICE void unpack2<half_t>(uint32_t word, float& low, float& high) {
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}

template <class T>
RF_DEVICE uint32_t pack2(float low, float high);
template <>
RF_DEVICE uint32_t pack2<bfloat16_t>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
RF_DEVICE uint32_t pack2<half_t>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

#define RF_MMA(TYPE)                                                        \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE       \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T>
RF_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
RF_DEVICE void mma_m16n8k16<half_t>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  RF_MMA("f16");
}
template <>
RF_DEVICE void mma_m16n8k16<bfloat16_t>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  RF_MMA("bf16");
}
#undef RF_MMA

inline cudaError_t multiprocessor_count(int* count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  if (shared_bytes > 48 << 10) {  // more than this must be asked for
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace randfuse::cuda
#else
#include "device.h"
#endif

namespace randfuse::cuda {

inline constexpr int kThreads = 256;  // of every block of this folder

RF_DEVICE Rate resolve(const RateSource& source) {
  return source.device_p ? drop_rate(*source.device_p) : source.rate;
}

struct StreamRow {
  uint64_t key;
  uint32_t i;
};

// With one key there is nothing to divide, the common case.
RF_DEVICE StreamRow stream_row(const MaskStream& s, int64_t row) {
  const int64_t group = row < s.rows_per_key ? 0 : row / s.rows_per_key;
  return {static_cast<uint64_t>(load_constant(s.keys + group)),
          static_cast<uint32_t>(s.row_offset + row - group * s.rows_per_key)};
}

// The decisions of columns [8j, 8j + 8) of the stream, or of the one `sample` sub-streams later.
RF_DEVICE Words mask_block(const MaskStream& s, const StreamRow& row, uint32_t j,
                           uint32_t sample = 0) {
  return block<kMaskRounds>(row.key, row.i, j, s.sample + sample, s.domain);
}

template <class T>
RF_DEVICE float load1(const T* p) {
  float low, high;
  unpack2<T>(p->bits, low, high);
  return low;
}
RF_DEVICE float load1(const float* p) { return *p; }
template <class T>
RF_DEVICE void store1(T* p, float v) {
  p->bits = static_cast<uint16_t>(pack2<T>(v, 0.0f));
}

// 8 neighbouring columns, the extent of one mask block, as 32-bit words.
template <class T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Pack8 {
  uint32_t w[2 * sizeof(T)];
};

template <class T>
RF_DEVICE void unpack8(const Pack8<T>& pack, float (&v)[8]) {
  for (int e = 0; e < 8; e += 2) unpack2<T>(pack.w[e / 2], v[e], v[e + 1]);
}
template <>
RF_DEVICE void unpack8<float>(const Pack8<float>& pack, float (&v)[8]) {
  memcpy(v, pack.w, sizeof v);
}

template <class T>
RF_DEVICE Pack8<T> pack8(const float (&v)[8]) {
  Pack8<T> pack;
  for (int e = 0; e < 8; e += 2) pack.w[e / 2] = pack2<T>(v[e], v[e + 1]);
  return pack;
}
template <>
RF_DEVICE Pack8<float> pack8<float>(const float (&v)[8]) {
  Pack8<float> pack;
  memcpy(pack.w, v, sizeof v);
  return pack;
}
template <>
RF_DEVICE Pack8<bool> pack8<bool>(const float (&v)[8]) {
  Pack8<bool> pack{};
  for (int e = 0; e < 8; ++e) {
    const uint32_t byte = v[e] != 0.0f ? 1u << e % 4 * 8 : 0u;
    pack.w[e / 4] |= byte;
  }
  return pack;
}

// Columns [c, c + 8) of a row of `cols`, zeros outside. Aligned rows are whole packs: a pack is
// either inside or outside.
template <class T, bool kAligned>
RF_DEVICE Pack8<T> load8(const T* row, int64_t c, int64_t cols) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Pack8<T>*>(row + c);
  } else {
    T v[8];
    for (int e = 0; e < 8; ++e) v[e] = 0 <= c + e && c + e < cols ? row[c + e] : T{};
    Pack8<T> pack;
    memcpy(&pack, v, sizeof pack);
    return pack;
  }
}

template <class T, bool kAligned>
RF_DEVICE void store8(T* row, int64_t c, int64_t cols, const Pack8<T>& pack) {
  if constexpr (kAligned && sizeof pack >= sizeof(Words)) {
    for (size_t i = 0; i < sizeof pack; i += sizeof(Words)) {
      Words words;
      memcpy(&words, pack.w + i / 4, sizeof words);
      store_words(row + c + i / sizeof(T), words);
    }
  } else if constexpr (kAligned) {
    *reinterpret_cast<Pack8<T>*>(row + c) = pack;
  } else {
    T v[8];
    memcpy(v, &pack, sizeof pack);
    for (int e = 0; e < 8; ++e) {
      if (0 <= c + e && c + e < cols) row[c + e] = v[e];
    }
  }
}

// Whether packs of a matrix lie on their own boundaries. `shift` is where column 0 of the matrix
// lies in its mask block.
template <class T>
bool aligned(const T* data, int64_t cols, int64_t stride, int64_t shift = 0) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Pack8<T>) == 0 && cols % 8 == 0 &&
         stride % 8 == 0 && shift == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace randfuse::cuda
