// Bytes: one read and one write a pass (4 bytes an element of bf16, 8 of fp32); two passes of a
// 16-bit transform keep fp32 in between. H200: 4.3 TB/s are 2.3 elements of fp32 or 4.6 of bf16 per
// clock and multiprocessor; shared memory moves 32. A tile goes through it once at each end and
// twice a stage: 6 accesses up to n = 2^8 (5.3 elements a clock), 8 to 2^13 (4), 10 beyond.
// n log2 n additions, all in registers.
//
// A block holds a tile of 2^kTile elements as fp32, tile index i = row << col_bits | column. The
// transform is one along `levels` bits of i from `first` on: column bits where transforms are
// contiguous (the tile is then one piece of memory with 2^kTile / n of them), row bits where they
// are strided (all n rows of 2^col_bits neighbouring columns, whole sectors). A thread holds 32
// elements in every stage: four packs of 8 at both ends, whose levels are bits 0 to 2 of i, and a
// window of five bits of i in each stage between.
//
// Sums are taken level by level in ascending order, so the bits are those of the plain butterfly.
#pragma once
#include "device.cuh"
#include "hadamard_transform.h"

namespace randfuse::cuda {

inline constexpr int kHadamardTile = 13;  // log2; 32 KiB: four blocks a multiprocessor

template <class In, class Out>
struct HadamardTiles {
  HadamardArgs<In, Out> args;  // of memory: contiguous transforms are one row
  int col_bits, first, levels;
  int64_t strips;   // of 2^col_bits columns, per outer index
  bool is_aligned;  // packs of 8 columns lie on their boundaries
};

// One float of padding after 32: a warp's accesses hit 32 banks at both ends (lanes are bits 3 to 7
// of i) and in windows at bit 3 (lanes are bits 0 to 2, 8, 9) and from bit 5 on (bits 0 to 4).
RF_HD constexpr int padded(int i) { return i + (i >> 5); }

// Levels [from, to) of the transform along the index of v.
template <int kBits>
RF_DEVICE void butterflies(float (&v)[1 << kBits], int from, int to) {
#pragma unroll
  for (int level = 0; level < kBits; ++level) {
    if (level < from || level >= to) continue;  // the same for the whole grid
#pragma unroll
    for (int i = 0; i < 1 << kBits; ++i) {
      if (i >> level & 1) continue;
      const float a = v[i], b = v[i | 1 << level];
      v[i] = a + b;
      v[i | 1 << level] = a - b;
    }
  }
}

// Levels [from, to) of those at bits [kWindow, kWindow + 5) of the tile index.
template <int kWindow>
RF_DEVICE void hadamard_stage(float* tile, int from, int to) {
  const int low = threadIdx.x & ((1 << kWindow) - 1);
  float* const at = tile + padded((threadIdx.x - low) << 5 | low);  // no carry from what is added
  float v[32];
#pragma unroll
  for (int e = 0; e < 32; ++e) v[e] = at[padded(e << kWindow)];
  butterflies<5>(v, from - kWindow, to - kWindow);
#pragma unroll
  for (int e = 0; e < 32; ++e) at[padded(e << kWindow)] = v[e];
  __syncthreads();
}

template <int kTile, class In, class Out>
__global__ void __launch_bounds__(1 << (kTile - 5), kTile <= kHadamardTile ? 4 : 1)
    hadamard_kernel(const HadamardTiles<In, Out> p) {
  RF_SHARED(float, tile, 0, padded(1 << kTile));
  constexpr int kPackStride = 1 << (kTile - 2);  // four packs a thread
  const int64_t outer = blockIdx.x / p.strips;
  const int64_t col = (blockIdx.x - outer * p.strips) << p.col_bits;
  const int64_t rows = outer * p.args.n;  // of memory, before the tile
  const int col_mask = (1 << p.col_bits) - 1, end = p.first + p.levels;

  Pack8<In> packs[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int i = threadIdx.x * 8 + j * kPackStride, row = i >> p.col_bits;
    const int64_t c = col + (i & col_mask);
    if (c >= p.args.inner) continue;
    const In* const from = p.args.x + (rows + row) * p.args.inner;
    packs[j] = p.is_aligned ? load8<In, true>(from, c, p.args.inner)
                            : load8<In, false>(from, c, p.args.inner);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float v[8];
    unpack8<In>(packs[j], v);
    butterflies<3>(v, p.first, end);
#pragma unroll
    for (int e = 0; e < 8; ++e) tile[padded(threadIdx.x * 8 + j * kPackStride) + e] = v[e];
  }
  __syncthreads();

  // The last window ends with the tile, over bits that the one before it has transformed.
  constexpr int kSecond = kTile < 13 ? kTile - 5 : 8;
  if (end > 3 && p.first < 8) hadamard_stage<3>(tile, p.first, end);
  if (end > 8) hadamard_stage<kSecond>(tile, max(p.first, 8), end);
  if constexpr (kTile > 13) {
    if (end > 13) hadamard_stage<kTile - 5>(tile, max(p.first, 13), end);
  }

#pragma unroll 1  // else the places of the packs stay in registers through all stages
  for (int j = 0; j < 4; ++j) {
    const int i = threadIdx.x * 8 + j * kPackStride, row = i >> p.col_bits;
    const int64_t c = col + (i & col_mask);
    if (c >= p.args.inner) continue;
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = tile[padded(i) + e] * p.args.scale;
    Out* const to = p.args.y + (rows + row) * p.args.inner;
    if (p.is_aligned) {
      store8<Out, true>(to, c, p.args.inner, pack8<Out>(v));
    } else {
      store8<Out, false>(to, c, p.args.inner, pack8<Out>(v));
    }
  }
}

}  // namespace randfuse::cuda
