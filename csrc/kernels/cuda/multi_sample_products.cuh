// D_s(X) W^T of many samples s: the main loop of multi_sample_linear and
// multi_sample_cross_entropy.
//
// X is read once (2MK bytes, eager: 7MK a sample) for 2SMNK flops and SMK/8 Philox calls. With S =
// 8 and N = 16 a call decides 16 bytes for 256 flops: the generator bounds the loop, about 60 issue
// slots a call, so every mask is drawn once, by the lane that holds the piece of X it masks, and
// used for all N columns (the ownership and the order of the fragments are dropout_linear's). The
// column's product of round 1 and one of round 2 serve all samples of a piece.
//
// A warp holds 16 rows x 128 sums: kSamples samples of kN columns; further samples are further
// passes over X, by other blocks, mostly from L2. A block is 8 warps: 128 rows or, where that
// leaves multiprocessors idle, 128 / slices rows, whose columns are cut into slices that meet in
// shared memory. So a batch of 64 rows takes one launch and no workspace.
#pragma once
#include <algorithm>
#include <type_traits>

#include "dropout_linear.cuh"

namespace randfuse::cuda {

inline constexpr int kWidth = 128;  // sums of a row
template <int kN>
inline constexpr int kSamples = kWidth / kN;

inline constexpr int kSampledResident = 1;  // blocks per multiprocessor
// X in flight: 8 KB per block and waiting stage, 48 KB per multiprocessor, where HBM asks for 23.
inline constexpr int kSampledStages = 4;
inline constexpr int kBlockRows = 16 * kWarps;
inline constexpr int kSumStride = kWidth + 1;  // a thread walks a row: 32 rows, 32 banks
inline constexpr int kSlotWords = 2 * kThreads;
// Pieces of W a stage; slices <= kSamples<kN>, so that this is all that kN and slices can ask for.
inline constexpr int kWeightWords = 4 * kWidth;
inline constexpr int kSampledShared =
    std::max(kSampledStages * (kSlotWords + kWeightWords) * 16, kBlockRows * kSumStride * 4);

struct SampledPlan {
  int64_t tiles;   // of kBlockRows / slices rows
  int64_t groups;  // of kSamples<kN> samples
  int slices;      // of the columns, a power of two
  int steps;       // of 32 columns, in a slice
  bool x_aligned, weight_aligned;

  // The block's share. Groups of a tile are neighbours, to find X in L2.
  RF_DEVICE int64_t first_row() const { return blockIdx.x / groups * rows(); }
  RF_DEVICE uint32_t group() const { return static_cast<uint32_t>(blockIdx.x % groups); }
  RF_DEVICE int rows() const { return kBlockRows / slices; }
};

// How the products are divided; a.n <= kN.
template <int kN, class T>
SampledPlan sampled_plan(const DropoutLinearArgs<T>& a, int64_t multiprocessors) {
  const int64_t shift = a.stream.col_offset % kMaskLanes;
  const int64_t steps = ceil_div(shift + a.k, kForwardCols);
  SampledPlan plan{};
  plan.groups = ceil_div(a.samples, kSamples<kN>);
  plan.slices = 1;
  const auto tiles = [&] { return ceil_div(a.m, kBlockRows / plan.slices); };
  while (plan.slices < kSamples<kN> && plan.slices < steps &&
         tiles() * plan.groups < multiprocessors * kSampledResident) {
    plan.slices *= 2;
  }
  plan.tiles = tiles();
  plan.steps = static_cast<int>(ceil_div(steps, plan.slices));
  plan.x_aligned = aligned(a.x, a.k, a.x_stride, shift);
  plan.weight_aligned = aligned(a.weight, a.k, a.weight_stride, shift);
  return plan;
}

// Calls body with n <= kMaxN rounded up to a compiled width.
template <class Body>
auto with_width(int64_t n, const Body& body) {
  if (n <= 16) return body(std::integral_constant<int, 16>{});
  if (n <= 32) return body(std::integral_constant<int, 32>{});
  if (n <= 64) return body(std::integral_constant<int, 64>{});
  return body(std::integral_constant<int, 128>{});
}

// The sums of the block's slices in shared memory.
struct SlicedSums {
  float* data;  // (slice, row, sample, column), rows kSumStride apart
  int rows, slices;

  RF_DEVICE float& at(int row, int i) const { return data[row * kSumStride + i]; }
  RF_DEVICE float total(int row, int i) const {  // in the order of the slices
    float sum = at(row, i);
    for (int s = 1; s < slices; ++s) sum += at(s * rows + row, i);
    return sum;
  }
};

// D_s(X) W^T without scale, of the block's rows and its first `samples` samples from `sample` on.
// Returns after a barrier.
template <class T, int kN>
RF_DEVICE SlicedSums sampled_products(const DropoutLinearArgs<T>& p, const SampledPlan& plan,
                                      uint32_t threshold, uint32_t sample, int samples) {
  constexpr int kStages = kSampledStages;
  RF_SHARED(Words, shared, 0, kSampledShared / 16);
  Words* const x_slots = shared;                         // (stage, row g or g+8, thread): private
  Words* const w_tiles = shared + kStages * kSlotWords;  // (stage, slice, n, piece)
  const Lane lane;
  const int shift = column_shift(p.stream);
  const int slice = lane.warp * 16 / plan.rows();
  const int64_t row0 = plan.first_row() + lane.warp * 16 % plan.rows() + lane.g;
  const int64_t rows[2] = {row0, row0 + 8};
  StreamRow stream_rows[2] = {};
  for (int h = 0; h < 2; ++h) {
    if (rows[h] < p.m) stream_rows[h] = stream_row(p.stream, rows[h]);
  }

  const auto stage = [&](int step) {
    if (step < plan.steps) {
      const int slot = step % kStages;
      const auto column = [&](int of_slice) {
        return (int64_t{of_slice} * plan.steps + step) * kForwardCols - shift;
      };
      for (int h = 0; h < 2; ++h) {
        stage8(x_slots + (slot * 2 + h) * kThreads + threadIdx.x, p.x + rows[h] * p.x_stride,
               column(slice) + 8 * lane.t, rows[h] < p.m ? p.k : 0, plan.x_aligned);
      }
      for (int i = threadIdx.x; i < plan.slices * kN * 4; i += kThreads) {
        const int n = i / 4 % kN;
        stage8(w_tiles + slot * kWeightWords + i, p.weight + n * p.weight_stride,
               column(i / (4 * kN)) + i % 4 * 8, n < p.n ? p.k : 0, plan.weight_aligned);
      }
    }
    cp_async_commit();
  };

  float acc[kSamples<kN>][kN / 8][4] = {};
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) stage(s);
#pragma unroll 1
  for (int step = 0; step < plan.steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the step's W has arrived, and everyone is done with the one before
    stage(step + kStages - 1);
    const int slot = step % kStages;
    const uint32_t j = static_cast<uint32_t>(p.stream.col_offset / kMaskLanes +
                                             (int64_t{slice} * plan.steps + step) * 4 + lane.t);
    const Words* w_tile = w_tiles + slot * kWeightWords + (slice * kN + lane.g) * 4 + lane.t;
#pragma unroll
    for (int m = 0; m < kSamples<kN>; ++m) {
      if (m >= samples) break;
      Words x[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        x[h] = x_slots[(slot * 2 + h) * kThreads + threadIdx.x];
        drop8(x[h], mask_block(p.stream, stream_rows[h], j, sample + m), threshold);
      }
#pragma unroll
      for (int tile = 0; tile < kN / 8; ++tile) {
        const Words w = w_tile[tile * 32];
#pragma unroll
        for (int s = 0; s < 4; s += 2) {
          mma_m16n8k16<T>(acc[m][tile], {x[0].r[s], x[1].r[s], x[0].r[s + 1], x[1].r[s + 1]},
                          w.r[s], w.r[s + 1]);
        }
      }
    }
  }

  __syncthreads();  // everyone is done with the operands, whose place the sums take
  const SlicedSums sums{reinterpret_cast<float*>(shared), plan.rows(), plan.slices};
#pragma unroll
  for (int i = 0; i < kWidth / 8 * 4; ++i) {
    const int tile = i / 4, e = i % 4;
    sums.at(lane.warp * 16 + lane.g + e / 2 * 8, tile * 8 + 2 * lane.t + e % 2) =
        acc[tile / (kN / 8)][tile % (kN / 8)][e];
  }
  __syncthreads();
  return sums;
}

}  // namespace randfuse::cuda
