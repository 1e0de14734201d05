// The walk of the elementwise kernels: out = body(keep, scale, a, b) over (rows, cols) matrices, of
// which a and b are the first kInputs.
//
// Unit of work: one mask block of one row, 8 columns, so every Philox call is made once and used
// whole. A unit is 16 bytes of fp16/bf16 or 32 of fp32 per operand. The grid is a few blocks per
// multiprocessor and strides over the units; a thread keeps kUnroll units in flight (64 bytes a
// thread, 1024 threads: 64 KB per multiprocessor, where HBM's latency asks for 23).
// Rows are found by carrying (row, block) along the stride: one 64-bit division per thread.
//
// Columns are counted from the start of the mask block that column 0 lies in (`shift` columns
// before it), so that any col_offset works; packs are then cut at both ends of a row (kAligned
// false: element loads, right but slower).
#pragma once
#include <algorithm>

#include "device.cuh"

namespace randfuse::cuda {

inline constexpr int kMapBlocks = 4;  // per multiprocessor: at most 64 registers a thread

template <class T>
struct MapParams {
  const T* a;  // (rows, cols)
  const T* b;  // (rows, cols), or null for zeros
  T* out;      // (rows, cols), row-major; may be a or b
  int64_t a_stride, b_stride;  // elements between rows
  int64_t rows, cols;
  MaskStream stream;
  RateSource rate;
};

// A unit's place; steps along the grid's stride without dividing.
struct Cursor {
  int64_t row, block;

  RF_DEVICE void advance(const Cursor& step, int64_t blocks_per_row) {
    row += step.row;
    block += step.block;
    if (block >= blocks_per_row) block -= blocks_per_row, ++row;
  }
};

template <int kInputs, bool kAligned, class T, class Body>
RF_DEVICE void map_rows(const MapParams<T>& p, const Body& body) {
  constexpr int kUnroll = kInputs == 0 ? 2 : 64 / (8 * sizeof(T) * kInputs);
  const Rate rate = resolve(p.rate);
  const float scale = static_cast<float>(rate.scale);
  const int shift = static_cast<int>(p.stream.col_offset % kMaskLanes);
  const uint32_t first_block = static_cast<uint32_t>(p.stream.col_offset / kMaskLanes);
  const int64_t per_row = (shift + p.cols + kMaskLanes - 1) / kMaskLanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const Cursor step{stride / per_row, stride % per_row};
  Cursor at{first / per_row, first % per_row};

  while (at.row < p.rows) {
    Pack8<T> a[kUnroll] = {}, b[kUnroll] = {};
    Cursor ahead = at;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, ahead.advance(step, per_row)) {
      if (ahead.row >= p.rows) continue;
      const int64_t c = ahead.block * kMaskLanes - shift;
      if constexpr (kInputs > 0) a[u] = load8<T, kAligned>(p.a + ahead.row * p.a_stride, c, p.cols);
      if constexpr (kInputs > 1) {
        if (p.b) b[u] = load8<T, kAligned>(p.b + ahead.row * p.b_stride, c, p.cols);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, at.advance(step, per_row)) {
      if (at.row >= p.rows) continue;
      const Words bits = mask_block(p.stream, stream_row(p.stream, at.row),
                                    first_block + static_cast<uint32_t>(at.block));
      float av[8] = {}, bv[8] = {}, out[8];
      if constexpr (kInputs > 0) unpack8<T>(a[u], av);
      if constexpr (kInputs > 1) unpack8<T>(b[u], bv);
#pragma unroll
      for (int e = 0; e < kMaskLanes; ++e) {
        out[e] = body(lane16(bits, e) >= rate.threshold, scale, av[e], bv[e]);
      }
      store8<T, kAligned>(p.out + at.row * p.cols, at.block * kMaskLanes - shift, p.cols,
                          pack8<T>(out));
    }
  }
}

template <class T>
using MapKernel = void (*)(MapParams<T>);

// Launches the kernel that the alignment of all operands allows.
template <class T>
cudaError_t launch_map(MapKernel<T> aligned_kernel, MapKernel<T> any_kernel, const MapParams<T>& p,
                       cudaStream_t stream) {
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t status = multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  const int64_t shift = p.stream.col_offset % kMaskLanes;
  const bool is_aligned = aligned(p.a, p.cols, p.a_stride, shift) &&
                          aligned(p.b, p.cols, p.b_stride, shift) &&
                          aligned(p.out, p.cols, p.cols, shift);
  const int64_t units = p.rows * ceil_div(shift + p.cols, kMaskLanes);
  const int64_t blocks =
      std::min<int64_t>(ceil_div(units, kThreads), int64_t{multiprocessors} * kMapBlocks);
  return launch(is_aligned ? aligned_kernel : any_kernel, blocks, kThreads, 0, stream, p);
}

}  // namespace randfuse::cuda
