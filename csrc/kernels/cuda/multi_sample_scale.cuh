// Elementwise: one read and one write (4 bytes of bf16), a quarter of a ten-round Philox call and
// `samples` comparisons an element. With 8 samples that is about 40 issue slots an element of a
// thread, 1.5 times what HBM leaves; a mean of masks is then still one pass over x.
//
// Unit of work as in map_rows.cuh: 8 columns from the start of the stream's block of 8, two Philox
// calls of four lanes. The thresholds come with the launch, or, where p is on the device, the first
// thread of each block makes them (samples^2 / 2 steps).
#pragma once
#include "map_rows.cuh"
#include "multi_sample_scale.h"

namespace randfuse::cuda {

struct CountTable {
  uint64_t thresholds[kMaxCount + 1];
  double scale;
};

inline constexpr int kScaleShared = sizeof(CountTable);

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMapBlocks)
    multi_sample_scale_kernel(const MultiSampleScaleArgs<T> p, const CountTable given) {
  RF_SHARED(CountTable, table, 0, 1);
  if (p.rate.device_p == nullptr) {
    for (int k = threadIdx.x; k < p.samples; k += kThreads)
      table->thresholds[k] = given.thresholds[k];
    if (threadIdx.x == 0) table->scale = given.scale;
  } else if (threadIdx.x == 0) {
    table->scale = count_table(resolve(p.rate).threshold, p.samples, table->thresholds);
  }
  __syncthreads();
  const float scale = static_cast<float>(table->scale);
  const int shift = static_cast<int>(p.stream.col_offset % kMaskLanes);
  const uint32_t first_block = static_cast<uint32_t>(p.stream.col_offset / kMaskLanes);
  const int64_t per_row = (shift + p.cols + kMaskLanes - 1) / kMaskLanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const Cursor step{stride / per_row, stride % per_row};
  for (Cursor at{first / per_row, first % per_row}; at.row < p.rows; at.advance(step, per_row)) {
    const int64_t c = at.block * kMaskLanes - shift;
    float v[8];
    unpack8<T>(load8<T, kAligned>(p.x + at.row * p.x_stride, c, p.cols), v);
    const StreamRow row = stream_row(p.stream, at.row);
    const uint32_t j = 2 * (first_block + static_cast<uint32_t>(at.block));
    Words bits[2];
    for (uint32_t h = 0; h < 2; ++h)
      bits[h] = block<kWordRounds>(row.key, row.i, j + h, p.stream.sample, p.stream.domain);
    int count[8] = {};
#pragma unroll 1
    for (int k = 0; k < p.samples; ++k) {
      const uint64_t threshold = table->thresholds[k];  // up to 2^32
#pragma unroll
      for (int e = 0; e < 8; ++e) count[e] += bits[e / 4].r[e % 4] >= threshold;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
      v[e] = count[e] > 0 ? v[e] * (static_cast<float>(count[e]) * scale) : 0.0f;
    store8<T, kAligned>(p.out + at.row * p.cols, c, p.cols, pack8<T>(v));
  }
}

}  // namespace randfuse::cuda
