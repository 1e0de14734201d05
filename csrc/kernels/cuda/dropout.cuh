// dropout, the exemplar of an elementwise kernel.
//
//   y = keep ? x * scale : 0,   keep = lane16(row, column) >= threshold
//
// Floor: one read and one write, 4 bytes an element in fp16/bf16 (8 in fp32), none for the mask,
// which is regenerated in backward. At 4.3 TB/s an H200 moves a unit of 8 bf16 columns per
// multiprocessor and lane in the time of ~220 instructions; Philox4x32-7 is ~65 of them, unpacking,
// comparing, scaling and packing 8 columns ~60. So memory, not the generator, sets the pace, which
// 32-bit decisions (two more calls a unit) would not allow.
//
// Grid, loads in flight and the handling of rows: map_rows.cuh.
#pragma once
#include "map_rows.cuh"

namespace randfuse::cuda {

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMapBlocks) dropout_kernel(const MapParams<T> p) {
  map_rows<1, kAligned>(p, [](bool keep, float scale, float x, float) {
    return keep ? x * scale : 0.0f;  // a select: a dropped NaN gives 0
  });
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads, kMapBlocks)
    dropout_mask_kernel(const MapParams<bool> p) {
  map_rows<0, kAligned>(p, [](bool keep, float, float, float) { return keep ? 1.0f : 0.0f; });
}

}  // namespace randfuse::cuda
