// dropout -> linear for narrow weights: tensor cores, the mask applied in registers.
//
//   forward  Y = scale * mask(X) W^T + bias   reads X once:   2MK bytes     2MNK flops
//   dgrad    dX = scale * mask(G W)           writes dX once: 2MK bytes     2MNK flops
//   wgrad    dW = scale * G^T mask(X)         reads X once:   2MK bytes     2MNK flops
//
// plus MN and NK terms. Eager moves 7MK (forward) and 5MK more for the mask and the dropped copy.
// One Philox call decides 8 elements = 16 bytes of X; at 4.3 TB/s an H200 multiprocessor has ~110
// warp instructions for the 512 bytes of a 16x16 tile, Philox takes 32 calls = one per lane, ~70 of
// them. So the generator uses most of the issue slots, must run once per element, and a warp owns
// all N columns of its rows (forward, dgrad) or all N rows of its columns (wgrad).
//
// The order of the contraction index inside an mma is free if A and B agree, and so are the columns
// of the result. Both are chosen so that a lane owns whole mask blocks, 8 neighbouring columns of
// a row, and every operand moves in 16-byte pieces without ldmatrix or shuffles. With g = lane / 4,
// t = lane % 4 (mma.m16n8k16: rows g and g+8 of A and C, columns pairs t and t+4 of A, 2t of C):
//
//   forward  32 columns of X are two mma steps; lane t holds columns [8t, 8t+8) of rows g and g+8.
//            Words 0 and 1 of the pieces are the first step's fragment, words 2 and 3 the second's;
//            the same 16 bytes of row n = g of W are the two B fragments.
//   dgrad    four accumulator tiles cover 32 columns of dX; column 2t+e of tile q is column
//            8t + 2q + e, so lane t ends with columns [8t, 8t+8). W stays in registers, G streams.
//   wgrad    16 rows of X are one mma step; lane (g, t) holds rows [4t, 4t+4) of columns
//            [8g, 8g+8), one column per n-tile, and packs pairs of rows after masking.
//
// Columns are counted from the start of the mask block that column 0 of X lies in.
//
// dgrad and wgrad with S samples (kMany) do all samples of 16 rows before the next rows: dX is
// written once and X read once, while G streams. The generator bounds them then, S calls a block.
#pragma once
#include "device.cuh"
#include "dropout_linear.h"

namespace randfuse::cuda {

inline constexpr int kWarps = kThreads / 32;
// Blocks per multiprocessor that the registers allow; wgrad has one.
template <int kN>
inline constexpr int kForwardResident = kN <= 32 ? 2 : 1;
template <int kN, bool kMany>  // with the sums over samples, N = 128 needs two registers too many
inline constexpr int kDgradResident = kN == 128 && kMany ? 1 : 2;
inline constexpr int kGradStages = 4;  // of the cp.async pipelines of dgrad and wgrad
// Forward has 8 KB of X in flight per block and waiting stage, so 48 or 40 KB per multiprocessor,
// where HBM's latency asks for 23.
template <int kN>
inline constexpr int kForwardStages = kForwardResident<kN> == 1 ? 6 : 4;
inline constexpr int kForwardRows = 16 * kWarps;  // of X per block
inline constexpr int kForwardCols = 32;           // of X per step
inline constexpr int kDgradRows = 16;             // of dX per step
inline constexpr int kDgradCols = 32 * kWarps;    // of dX per block

// wgrad keeps (N, kCols / kWarps) sums in the registers of a warp, 128 a lane at most: for N = 128
// a warp has 32 columns, so two steps of 16 rows share a masked tile (see exchange_halves).
template <int kN>
struct Wgrad {
  static constexpr int kWarpCols = kN <= 64 ? 64 : 32;
  static constexpr int kCols = kWarpCols * kWarps;  // of X per block
  static constexpr int kHalves = 64 / kWarpCols;
  static constexpr int kRows = 16 * kHalves;  // of X per step
  static constexpr int kTiles = kWarpCols / 8;
  static constexpr int kQuads = kN * 4 * kHalves;  // 4 rows of a column of G, per step
};

// Dynamic shared memory of the three kernels, in bytes.
template <int kN>
inline constexpr int kForwardShared = kForwardStages<kN> * (2 * kThreads + 4 * kN) * 16;
template <int kN>
inline constexpr int kDgradShared = (kGradStages * (kN / 32) * 64 + kN * 4 * kWarps) * 16;
template <int kN>
inline constexpr int kWgradShared = kGradStages * 4 * kThreads * 16 + 2 * Wgrad<kN>::kQuads * 8;

// How the work is divided. Blocks are tiles x splits; a split is `steps` steps of the contraction
// (forward: columns, wgrad: rows) or, in dgrad, of the rows.
struct Plan {
  int64_t tiles, splits;
  int steps, total_steps;
  bool x_aligned, weight_aligned, grad_aligned, out_aligned;
};

// A step of one sample.
struct SampleStep {
  int step;
  uint32_t sample = 0;

  RF_DEVICE void advance(uint32_t samples) {
    if (++sample == samples) sample = 0, ++step;
  }
};

struct Lane {
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
};

RF_DEVICE int column_shift(const MaskStream& s) {
  return static_cast<int>(s.col_offset % kMaskLanes);
}

// Columns [c, c + 8) of a row, zeros outside [0, cols), on their way to shared memory. Visible to
// this thread after cp_async_wait, to others after a barrier too.
template <class T>
RF_DEVICE void stage8(Words* to, const T* row, int64_t c, int64_t cols, bool is_aligned) {
  if (is_aligned) {
    const bool inside = 0 <= c && c < cols;
    cp_async_16(to, inside ? row + c : row, inside);
  } else {
    T* elements = reinterpret_cast<T*>(to);
#pragma unroll 2  // this path is not hot; few registers for it
    for (int e = 0; e < 8; ++e) elements[e] = 0 <= c + e && c + e < cols ? row[c + e] : T{};
  }
}

RF_DEVICE void drop8(Words& pairs, const Words& bits, uint32_t threshold) {
#pragma unroll
  for (int w = 0; w < 4; ++w) pairs.r[w] &= keep_pair(bits.r[w], threshold);
}

template <class T, int kN>
__global__ void __launch_bounds__(kThreads, kForwardResident<kN>)
    dropout_linear_kernel(const DropoutLinearArgs<T> p, const Plan plan) {
  constexpr int kStages = kForwardStages<kN>;
  RF_SHARED(Words, x_slots, 0, kStages * 2 * kThreads);  // (stage, row g or g+8, thread): private
  RF_SHARED(Words, w_tiles, kStages * 2 * kThreads * 16, kStages * kN * 4);  // (stage, n, piece)
  const Lane lane;
  const Rate rate = resolve(p.rate);
  const int shift = column_shift(p.stream);
  const int64_t split = blockIdx.x / plan.tiles;
  const int64_t row0 = blockIdx.x % plan.tiles * kForwardRows + lane.warp * 16 + lane.g;
  const int first = static_cast<int>(split) * plan.steps;
  const int last = min(first + plan.steps, plan.total_steps);
  const int64_t rows[2] = {row0, row0 + 8};
  StreamRow stream_rows[2] = {};
  for (int h = 0; h < 2; ++h) {
    if (rows[h] < p.m) stream_rows[h] = stream_row(p.stream, rows[h]);
  }

  const auto stage = [&](int step) {
    if (step < last) {
      const int slot = step % kStages;
      const int64_t c = int64_t{step} * kForwardCols - shift;
      for (int h = 0; h < 2; ++h) {
        stage8(x_slots + (slot * 2 + h) * kThreads + threadIdx.x, p.x + rows[h] * p.x_stride,
               c + 8 * lane.t, rows[h] < p.m ? p.k : 0, plan.x_aligned);
      }
      for (int i = threadIdx.x; i < kN * 4; i += kThreads) {
        stage8(w_tiles + slot * kN * 4 + i, p.weight + i / 4 * p.weight_stride, c + i % 4 * 8,
               i / 4 < p.n ? p.k : 0, plan.weight_aligned);
      }
    }
    cp_async_commit();
  };

  float acc[kN / 8][4] = {};
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) stage(first + s);
#pragma unroll 1
  for (int step = first; step < last; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the step's W has arrived, and everyone is done with the one before
    stage(step + kStages - 1);
    const int slot = step % kStages;
    const uint32_t j =
        static_cast<uint32_t>(p.stream.col_offset / kMaskLanes + int64_t{step} * 4 + lane.t);
    Words x[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x[h] = x_slots[(slot * 2 + h) * kThreads + threadIdx.x];
      drop8(x[h], mask_block(p.stream, stream_rows[h], j), rate.threshold);
    }
#pragma unroll
    for (int tile = 0; tile < kN / 8; ++tile) {
      const Words w = w_tiles[(slot * kN + tile * 8 + lane.g) * 4 + lane.t];
#pragma unroll
      for (int s = 0; s < 4; s += 2) {
        mma_m16n8k16<T>(acc[tile], {x[0].r[s], x[1].r[s], x[0].r[s + 1], x[1].r[s + 1]}, w.r[s],
                        w.r[s + 1]);
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kN / 8; ++tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t row = rows[e / 2], col = tile * 8 + 2 * lane.t + e % 2;
      if (row >= p.m || col >= p.n) continue;
      if (plan.splits > 1) {
        p.workspace[(split * p.m + row) * p.n + col] = acc[tile][e];
      } else {
        const float y = static_cast<float>(rate.scale) * acc[tile][e];
        store1(p.out + row * p.n + col, p.bias ? y + load1(p.bias + col) : y);
      }
    }
  }
}

template <class T, int kN, bool kMany>
__global__ void __launch_bounds__(kThreads, kDgradResident<kN, kMany>)
    dropout_linear_dgrad_kernel(const DropoutLinearArgs<T> p, const Plan plan) {
  RF_SHARED(Words, g_tiles, 0, kGradStages * (kN / 32) * 64);  // (stage, 32 columns, row, piece)
  RF_SHARED(Words, w_rows, kGradStages * (kN / 32) * 64 * 16, kN * 4 * kWarps);  // (n, piece)
  const Lane lane;
  const Rate rate = resolve(p.rate);
  const int shift = column_shift(p.stream);
  const uint32_t samples = kMany ? static_cast<uint32_t>(p.samples) : 1u;
  const int64_t block_col0 = blockIdx.x % plan.tiles * kDgradCols;
  const int first = static_cast<int>(blockIdx.x / plan.tiles) * plan.steps;
  const int last = min(first + plan.steps, plan.total_steps);

  SampleStep ahead{first};  // of the next G to stage
  unsigned slot = 0;        // it goes to, of kGradStages in turn
  const auto stage_next = [&] {
    if (ahead.step < last) {
      Words* tile = g_tiles + slot % kGradStages * (kN / 32) * 64;
      const T* grad = p.grad + ahead.sample * p.grad_sample_stride;
      for (int i = threadIdx.x; i < kN / 32 * 64; i += kThreads) {
        const int64_t row = int64_t{ahead.step} * kDgradRows + i / 4 % 16;
        stage8(tile + i, grad + row * p.grad_stride, i / 64 * 32 + i % 4 * 8, row < p.m ? p.n : 0,
               plan.grad_aligned);
      }
    }
    cp_async_commit();
    ahead.advance(samples);
    ++slot;
  };
  for (int i = threadIdx.x; i < kN * 4 * kWarps; i += kThreads) {
    const int n = i / (4 * kWarps), piece = i % (4 * kWarps);
    stage8(w_rows + i, p.weight + n * p.weight_stride, block_col0 + 8 * piece - shift,
           n < p.n ? p.k : 0, plan.weight_aligned);
  }
  cp_async_commit();
#pragma unroll 1
  for (int s = 0; s < kGradStages - 1; ++s) stage_next();

  // B fragments of all N rows of W for the warp's 32 columns, read once per block: register r of
  // mma step 2s+h and tile q holds rows n, n + 1 = 32s + 8t + 4h + 2r + {0, 1} of one column, which
  // is half of word q of a piece.
  cp_async_wait<kGradStages - 1>();
  __syncthreads();
  uint32_t w[kN / 32][2][4][2];
#pragma unroll
  for (int i = 0; i < kN / 8; ++i) {
    const int s = i / 4, h = i / 2 % 2, r = i % 2;
    const int n = 32 * s + 8 * lane.t + 4 * h + 2 * r;
    const Words top = w_rows[n * 4 * kWarps + 4 * lane.warp + lane.g / 2];
    const Words bottom = w_rows[(n + 1) * 4 * kWarps + 4 * lane.warp + lane.g / 2];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      w[s][h][q][r] = lane.g % 2 ? top.r[q] >> 16 | (bottom.r[q] & 0xFFFF0000u)
                                 : (top.r[q] & 0xFFFFu) | bottom.r[q] << 16;
    }
  }

  const int64_t c = block_col0 + lane.warp * 32 + 8 * lane.t - shift;
  const uint32_t j = static_cast<uint32_t>((p.stream.col_offset + c) / kMaskLanes);
  float sum[2][8] = {};  // over the samples, of rows g and g + 8
#pragma unroll 1
  for (SampleStep at{first}; at.step < last; at.advance(samples)) {
    cp_async_wait<kGradStages - 2>();
    __syncthreads();  // the step's G has arrived, and everyone is done with the one before
    const Words* tile = g_tiles + (slot + 1) % kGradStages * (kN / 32) * 64;
    stage_next();
    float acc[4][4] = {};
#pragma unroll
    for (int s = 0; s < kN / 32; ++s) {
      const Words low = tile[(s * 16 + lane.g) * 4 + lane.t];
      const Words high = tile[(s * 16 + lane.g + 8) * 4 + lane.t];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int h = i / 4, q = i % 4;
        mma_m16n8k16<T>(acc[q], {low.r[2 * h], high.r[2 * h], low.r[2 * h + 1], high.r[2 * h + 1]},
                        w[s][h][q][0], w[s][h][q][1]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = int64_t{at.step} * kDgradRows + lane.g + 8 * h;
      if (row >= p.m || c >= p.k) continue;
      const Words bits = mask_block(p.stream, stream_row(p.stream, row), j, at.sample);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float kept = lane16(bits, e) >= rate.threshold ? acc[e / 2][2 * h + e % 2] : 0.0f;
        sum[h][e] = at.sample == 0 ? kept : sum[h][e] + kept;
      }
      if (at.sample + 1 < samples) continue;
      float v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = sum[h][e] * static_cast<float>(rate.scale);
      const Pack8<T> pack = pack8<T>(v);
      if (plan.out_aligned) {
        store8<T, true>(p.out + row * p.k, c, p.k, pack);
      } else {
        store8<T, false>(p.out + row * p.k, c, p.k, pack);
      }
    }
  }
}

struct alignas(8) Quad {  // 4 rows of one column of G, two per word
  uint32_t w[2];
};

// Two lanes, g even and odd, have each masked 8 columns of 16 rows, the even one the first 16 rows
// and the odd one the next; they swap so that each has 4 columns of all 32.
// In: pairs[q] of columns 8 (g/2) + q. Out: pairs[half * 4 + q] of columns 4 g + q.
RF_DEVICE void exchange_halves(uint32_t (&pairs)[8][2], bool odd) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t& first = pairs[i / 2][i % 2];
    uint32_t& second = pairs[4 + i / 2][i % 2];
    const uint32_t received = __shfl_xor_sync(~0u, odd ? first : second, 4);
    first = odd ? received : first;
    second = odd ? second : received;
  }
}

template <class T, int kN, bool kMany>
__global__ void __launch_bounds__(kThreads, 1)
    dropout_linear_wgrad_kernel(const DropoutLinearArgs<T> p, const Plan plan) {
  using Shape = Wgrad<kN>;
  constexpr int kQuadsPerThread = (Shape::kQuads + kThreads - 1) / kThreads;
  RF_SHARED(Words, x_slots, 0, kGradStages * 4 * kThreads);  // (stage, row of 4, thread): private
  // (buffer, half, n, t)
  RF_SHARED(Quad, g_quads, kGradStages * 4 * kThreads * 16, 2 * Shape::kQuads);
  const Lane lane;
  const Rate rate = resolve(p.rate);
  const int shift = column_shift(p.stream);
  const bool odd = lane.g % 2;
  const uint32_t samples = kMany ? static_cast<uint32_t>(p.samples) : 1u;
  const int64_t split = blockIdx.x / plan.tiles;
  const int64_t col0 = blockIdx.x % plan.tiles * Shape::kCols + lane.warp * Shape::kWarpCols;
  const int first = static_cast<int>(split) * plan.steps;
  const int last = min(first + plan.steps, plan.total_steps);
  // The piece of X that this lane masks: rows x_row + [0, 4) of a step, columns c + [0, 8).
  const int x_row = 4 * lane.t + (Shape::kHalves == 2 && odd ? 16 : 0);
  const int64_t c = col0 + 8 * (lane.g / Shape::kHalves) - shift;
  const uint32_t j = static_cast<uint32_t>((p.stream.col_offset + c) / kMaskLanes);

  const auto stage_x = [&](int step) {
    if (step < last) {
      for (int r = 0; r < 4; ++r) {
        const int64_t row = int64_t{step} * Shape::kRows + x_row + r;
        stage8(x_slots + (step % kGradStages * 4 + r) * kThreads + threadIdx.x,
               p.x + row * p.x_stride, c, row < p.m ? p.k : 0, plan.x_aligned);
      }
    }
    cp_async_commit();
  };
  Quad g_next[kQuadsPerThread];
  const auto load_g = [&](const SampleStep& at) {
    const T* grad = p.grad + at.sample * p.grad_sample_stride;
#pragma unroll
    for (int i = 0; i < kQuadsPerThread; ++i) {
      const int quad = i * kThreads + threadIdx.x, n = quad % kN;
      const auto element = [&](int r) {
        const int64_t row = int64_t{at.step} * Shape::kRows + quad / kN * 4 + r;
        const bool inside = quad < Shape::kQuads && n < p.n && at.step < last && row < p.m;
        return inside ? uint32_t{grad[row * p.grad_stride + n].bits} : 0u;
      };
      g_next[i] = {element(0) | element(1) << 16, element(2) | element(3) << 16};
    }
  };
  const auto store_g = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kQuadsPerThread; ++i) {
      const int quad = i * kThreads + threadIdx.x;
      const int slot = (quad / (4 * kN) * kN + quad % kN) * 4 + quad / kN % 4;  // (half, n, t)
      if (quad < Shape::kQuads) g_quads[buffer * Shape::kQuads + slot] = g_next[i];
    }
  };

  float acc[kN / 16][Shape::kTiles][4] = {};
#pragma unroll 1
  for (int s = 0; s < kGradStages - 1; ++s) stage_x(first + s);
  SampleStep at{first}, next{first};
  load_g(next);
  store_g(0);
#pragma unroll 1
  for (int buffer = 0; at.step < last; at = next, buffer ^= 1) {
    if (at.sample == 0) cp_async_wait<kGradStages - 2>();
    __syncthreads();  // the step's G is stored, and everyone is done with the buffer of the next
    if (at.sample == 0) stage_x(at.step + kGradStages - 1);
    next.advance(samples);
    load_g(next);  // in flight while this step computes

    Words x[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t row = int64_t{at.step} * Shape::kRows + x_row + r;
      x[r] = x_slots[(at.step % kGradStages * 4 + r) * kThreads + threadIdx.x];
      const StreamRow from = row < p.m ? stream_row(p.stream, row) : StreamRow{};
      drop8(x[r], mask_block(p.stream, from, j, at.sample), rate.threshold);
    }
    uint32_t pairs[8][2];  // (column, rows 0 and 1 or 2 and 3)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int word = i / 2, r = i % 2 * 2;
      const uint32_t upper = x[r].r[word], lower = x[r + 1].r[word];
      pairs[2 * word][r / 2] = (upper & 0xFFFFu) | lower << 16;
      pairs[2 * word + 1][r / 2] = upper >> 16 | (lower & 0xFFFF0000u);
    }
    if constexpr (Shape::kHalves == 2) exchange_halves(pairs, odd);

    const Quad* g_tile = g_quads + buffer * Shape::kQuads;
#pragma unroll
    for (int h = 0; h < Shape::kHalves; ++h) {
#pragma unroll
      for (int rows = 0; rows < kN / 16; ++rows) {
        const Quad low = g_tile[(h * kN + rows * 16 + lane.g) * 4 + lane.t];
        const Quad high = g_tile[(h * kN + rows * 16 + lane.g + 8) * 4 + lane.t];
#pragma unroll
        for (int q = 0; q < Shape::kTiles; ++q) {
          const uint32_t (&b)[2] = pairs[h * 4 + q];
          mma_m16n8k16<T>(acc[rows][q], {low.w[0], high.w[0], low.w[1], high.w[1]}, b[0], b[1]);
        }
      }
    }
    store_g(buffer ^ 1);
  }

  // Partial sums (split, n, padded columns): lane t holds kTiles neighbouring columns, twice.
  const int64_t padded = plan.tiles * Shape::kCols;
#pragma unroll
  for (int i = 0; i < kN / 16 * 4; ++i) {
    const int rows = i / 4, high = i / 2 % 2, e = i % 2;
    const int64_t n = rows * 16 + lane.g + 8 * high;
    if (n >= p.n) continue;
    float* to = p.workspace + (split * p.n + n) * padded + col0 + Shape::kTiles * (2 * lane.t + e);
#pragma unroll
    for (int q = 0; q < Shape::kTiles; q += 4) {
      Words four;
      for (int v = 0; v < 4; ++v) memcpy(&four.r[v], &acc[rows][q + v][2 * high + e], 4);
      store_words(to + q, four);
    }
  }
}

// out (rows, cols) = scale * sum over splits of partial (split, rows, stride)[:, shift:] + bias,
// the sum in order of the splits.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_splits_kernel(const float* partial, int64_t splits, int64_t rows, int64_t cols,
                      int64_t stride, int64_t shift, const RateSource source, const T* bias,
                      T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * cols) return;
  const int64_t row = i / cols, col = i % cols;
  float sum = 0.0f;
  for (int64_t s = 0; s < splits; ++s) sum += partial[(s * rows + row) * stride + shift + col];
  const float y = static_cast<float>(resolve(source).scale) * sum;
  store1(out + i, bias ? y + load1(bias + col) : y);
}

}  // namespace randfuse::cuda
