// Bytes: A once for every 1024 rows of output (later reads mostly from L2), Y once, and partial
// sums written and read once where A is cut into chunks of rows: at most 128 blocks of 1024 x 32
// floats, 32 MB. The operator costs none. HBM of an H200 feeds a multiprocessor 4.6 fp32 elements a
// clock; with nnz = 4 a group of 32 takes 1 + 4 accesses of 128 bytes to shared memory (6.4
// elements a clock) and about 26 issue slots (4.9).
//
// Gather form, without atomics on floats. A block has 16 warps, 32 columns (a lane each) and 1024
// rows of output, 64 to a warp in registers. It walks over batches of 512 rows of A in shared
// memory, the next one on its way. For up to four nonzeros a column at a time it sorts the batch's
// nonzeros by output row: count, prefix sum, scatter, and the place among those of the same output
// row by comparing, so that a sum is taken in the order of A's rows whatever threads did first. All
// of an output row's nonzeros belong to one of the nnz blocks of rows, so a list never mixes two.
// Lists of d / nnz rows are short; where d is very small comparing them costs up to 512 steps.
//
// The adjoint gathers by definition: an element of X is nnz reads of Y per operator, from L2.
#pragma once
#include "device.cuh"
#include "sparse_sketch.h"

namespace randfuse::cuda {

inline constexpr int kSketchThreads = 512, kSketchWarps = kSketchThreads / 32;
inline constexpr int kSlots = kSketchBins / kSketchWarps;        // output rows a warp
inline constexpr int kGroup = 4 * kSketchThreads / kSketchRows;  // nonzeros at a time
inline constexpr int kListed = kGroup * kSketchRows;             // one Philox call a thread
inline constexpr int kStartsBytes = (kSketchBins + 4) * 4;       // one more, in 16 bytes
inline constexpr int kListBytes = kListed * 4;
inline constexpr int kTileOffset = kStartsBytes + 2 * kListBytes + kSketchWarps * 4;
inline constexpr int kAdjointCols = 1024;                          // columns of X in a block
inline constexpr int kAdjointRows = 128;                           // rows of X in a block
inline constexpr int kAdjointGroup = 4 * kThreads / kAdjointRows;  // nonzeros at a time

// Elements between rows of a batch in shared memory: asynchronous copies want 16 bytes, element
// copies along rows want another bank for each.
template <bool kAsync>
inline constexpr int kBatchStride = kAsync ? kSketchCols : kSketchCols + 1;

template <class T, bool kAsync>
constexpr int sketch_shared() {
  return kTileOffset +
         (kAsync ? 2 : 1) * kSketchRows * kBatchStride<kAsync> * static_cast<int>(sizeof(T));
}

// Nonzero e = k nnz + t of the four columns from `column`, a multiple of 4, on.
struct Nonzeros {
  Words words;
  uint32_t first, size;  // rows of the operator among which they choose
  int64_t shift;         // from a row of operator k to its place among the rows of all Y_k

  RF_DEVICE Nonzeros(const SparseOperator& op, uint32_t e, int64_t column) {
    const uint32_t nnz = static_cast<uint32_t>(op.nnz), k = e / nnz, t = e - k * nnz;
    words = long_block<kWordRounds>(static_cast<uint64_t>(load_constant(op.keys + k)),
                                    static_cast<uint64_t>(column) / 4, t,
                                    domain_word(static_cast<uint32_t>(Op::kSketchIndex), 5));
    first = first_row(op.d, op.nnz, t);
    size = first_row(op.d, op.nnz, t + 1) - first;
    shift = k * op.rows() - op.row_begin;
  }
  RF_DEVICE bool negative(int i) const { return words.r[i] & 1u; }
  RF_DEVICE int64_t row(int i) const { return nonzero_row(words.r[i], first, size); }
  // The place among the rows of all Y_k, -1 outside of the block of rows.
  RF_DEVICE int64_t place(const SparseOperator& op, int i) const {
    const int64_t r = row(i);
    return op.row_begin <= r && r < op.row_end ? shift + r : -1;
  }
};

// A batch: rows [row, row + 512) of A, of which those in [0, rows) exist, and 32 columns from
// `col`.
template <class T, bool kAsync>
RF_DEVICE void load_batch(const SparseSketchArgs<T>& p, int64_t row, int64_t col, T* tile) {
  constexpr int kStride = kBatchStride<kAsync>;
  const int cols = static_cast<int>(min(p.cols - col, int64_t{kSketchCols}));
  if constexpr (kAsync) {
    constexpr int kLanes = 16 / sizeof(T), kPieces = kSketchCols / kLanes;
#pragma unroll
    for (int i = threadIdx.x; i < kSketchRows * kPieces; i += kSketchThreads) {
      const int r = i / kPieces, c = i % kPieces * kLanes;
      const bool exists = 0 <= row + r && row + r < p.rows && c < cols;
      const T* const from = exists ? p.a + (row + r) * p.row_stride + col + c : p.a;
      cp_async_16(tile + r * kStride + c, from, exists);
    }
    cp_async_commit();
  } else {
    const bool down = p.row_stride == 1;  // neighbours in memory for neighbouring threads
    for (int i = threadIdx.x; i < kSketchRows * cols; i += kSketchThreads) {
      const int r = down ? i % kSketchRows : i / cols, c = down ? i / kSketchRows : i % cols;
      if (row + r < 0 || row + r >= p.rows) continue;
      tile[r * kStride + c] = p.a[(row + r) * p.row_stride + (col + c) * p.col_stride];
    }
  }
}

// Exclusive prefix sums of `starts`, one more entry than there are bins, two of them a thread.
RF_DEVICE void prefix_sums(uint32_t* starts, uint32_t* totals) {
  static_assert(kSketchBins == 2 * kSketchThreads, "two bins a thread");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t one = starts[2 * threadIdx.x], both = one + starts[2 * threadIdx.x + 1];
  uint32_t sum = both;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t before = __shfl_sync(~0u, sum, lane < step ? lane : lane - step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) totals[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += totals[w];
  starts[2 * threadIdx.x] = sum - both;
  starts[2 * threadIdx.x + 1] = sum - both + one;
  if (threadIdx.x == kSketchThreads - 1) starts[kSketchBins] = sum;
}

// Lists nonzeros [e, e + kGroup) of the batch that starts at `row` of A by output row: those of
// bin b are sorted[starts[b]] to sorted[starts[b + 1]], ascending row << 1 | negative.
template <class T>
RF_DEVICE void list_nonzeros(const SparseSketchArgs<T>& p, uint32_t e, int64_t row,
                             int64_t first_bin, uint32_t* starts, uint32_t* unsorted,
                             uint32_t* sorted, uint32_t* totals) {
  for (int b = threadIdx.x; b < kSketchBins; b += kSketchThreads) starts[b] = 0;
  __syncthreads();
  constexpr int kQuads = kSketchRows / 4;
  const int quad = threadIdx.x % kQuads * 4;
  const uint32_t own = e + threadIdx.x / kQuads;
  const bool exists = own < static_cast<uint32_t>(p.op.count * p.op.nnz);
  const Nonzeros nonzeros(p.op, exists ? own : e, p.op.col_offset + row + quad);
  int bin[4];  // -1: not here
  uint32_t entry[4], rank[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t place = nonzeros.place(p.op, i), at = row + quad + i;
    const bool here =
        exists && 0 <= at && at < p.rows && first_bin <= place && place < first_bin + kSketchBins;
    bin[i] = here ? static_cast<int>(place - first_bin) : -1;
    entry[i] = static_cast<uint32_t>(quad + i) << 1 | nonzeros.negative(i);
    rank[i] = here ? atomicAdd(&starts[bin[i]], 1u) : 0;
  }
  __syncthreads();
  prefix_sums(starts, totals);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (bin[i] >= 0) unsorted[starts[bin[i]] + rank[i]] = entry[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (bin[i] < 0) continue;
    uint32_t place = starts[bin[i]];
    for (uint32_t at = place, end = starts[bin[i] + 1]; at < end; ++at) {
      place += unsorted[at] < entry[i];
    }
    sorted[place] = entry[i];
  }
  __syncthreads();
}

template <class T, bool kAsync>
__global__ void __launch_bounds__(kSketchThreads, 1)
    sparse_sketch_kernel(const SparseSketchArgs<T> p, const SketchCut cut) {
  RF_SHARED(uint32_t, starts, 0, kSketchBins + 1);
  RF_SHARED(uint32_t, unsorted, kStartsBytes, kListed);
  RF_SHARED(uint32_t, sorted, kStartsBytes + kListBytes, kListed);
  RF_SHARED(uint32_t, totals, kStartsBytes + 2 * kListBytes, kSketchWarps);
  constexpr int kStride = kBatchStride<kAsync>, kTile = kSketchRows * kStride;
  RF_SHARED(T, tiles, kTileOffset, (kAsync ? 2 : 1) * kTile);
  // Tiles of the same piece of A are neighbours: what one has read, the others find in L2.
  const int64_t part = blockIdx.x / cut.tiles, chunk = part / cut.strips;
  const int64_t first_bin = (blockIdx.x - part * cut.tiles) * kSketchBins;
  const int64_t col = (part - chunk * cut.strips) * kSketchCols;
  const int64_t out_rows = p.op.count * p.op.rows();
  const int64_t begin = chunk * cut.chunk_batches,
                end = min(begin + cut.chunk_batches, cut.batches);
  const int64_t before = p.op.col_offset % 4;  // rows of batch 0 before row 0 of A
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t nonzeros = static_cast<uint32_t>(p.op.count * p.op.nnz);

  float sums[kSlots] = {};
  if (kAsync && begin < end) {
    load_batch<T, kAsync>(p, begin * kSketchRows - before, col, tiles + begin % 2 * kTile);
  }
  for (int64_t batch = begin; batch < end; ++batch) {
    const int64_t row = batch * kSketchRows - before;
    T* const tile = tiles + (kAsync ? batch % 2 * kTile : 0);
    if constexpr (kAsync) {
      T* const next = tiles + (batch + 1) % 2 * kTile;
      if (batch + 1 < end) load_batch<T, kAsync>(p, row + kSketchRows, col, next);
      if (batch + 1 < end) {
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
    } else {
      load_batch<T, kAsync>(p, row, col, tile);
    }  // made visible to all threads by the barriers of list_nonzeros
    for (uint32_t e = 0; e < nonzeros; e += kGroup) {
      list_nonzeros(p, e, row, first_bin, starts, unsorted, sorted, totals);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int bin = slot * kSketchWarps + warp;
        for (uint32_t at = starts[bin], last = starts[bin + 1]; at < last; ++at) {
          const uint32_t entry = sorted[at];
          const float v = load1(tile + (entry >> 1) * kStride + lane);
          sums[slot] += entry & 1u ? -v : v;
        }
      }
      __syncthreads();  // the lists and, after the last of them, the batch are used up
    }
  }

  const bool whole = cut.chunks == 1;
  float* const out = (whole ? p.y : p.sums + chunk * out_rows * p.cols) + col + lane;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t place = first_bin + slot * kSketchWarps + warp;
    if (place < out_rows && col + lane < p.cols) {
      out[place * p.cols] = whole ? p.scale * sums[slot] : sums[slot];
    }
  }
}

// y = scale * the sum over chunks, in their order.
__global__ void __launch_bounds__(kThreads)
    sketch_sums_kernel(const float* sums, float* y, int64_t count, int64_t chunks, float scale) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    float sum = sums[i];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += sums[chunk * count + i];
    y[i] = scale * sum;
  }
}

struct AdjointNonzero {
  int64_t place;  // -1: none
  float sign;
};

// A block takes 128 rows of X, whole blocks of the stream, and up to 1024 columns; it draws eight
// nonzeros of each row at a time into shared memory, which all columns then read.
__global__ void __launch_bounds__(kThreads)
    sparse_sketch_adjoint_kernel(const SparseAdjointArgs p, int64_t strips) {
  RF_SHARED(AdjointNonzero, drawn, 0, kAdjointGroup * kAdjointRows);
  const int64_t batch = blockIdx.x / strips, col = (blockIdx.x - batch * strips) * kAdjointCols;
  const int64_t row = batch * kAdjointRows - p.op.col_offset % 4;  // of batch 0 may be negative
  const uint32_t cols = static_cast<uint32_t>(min(p.cols - col, int64_t{kAdjointCols}));
  const uint32_t nonzeros = static_cast<uint32_t>(p.op.count * p.op.nnz);
  constexpr int kQuads = kAdjointRows / 4;
  const int quad = threadIdx.x % kQuads * 4, which = threadIdx.x / kQuads;
  for (uint32_t e = 0; e < nonzeros; e += kAdjointGroup) {
    const bool exists = e + which < nonzeros;
    const Nonzeros own(p.op, exists ? e + which : e, p.op.col_offset + row + quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      drawn[which * kAdjointRows + quad + i] = {exists ? own.place(p.op, i) : -1,
                                                own.negative(i) ? -1.0f : 1.0f};
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kAdjointRows * cols; i += kThreads) {
      const uint32_t r = i / cols, c = i - r * cols;
      if (row + r < 0 || row + r >= p.rows) continue;
      float* const x = p.x + (row + r) * p.cols + col + c;
      float sum = e == 0 ? 0.0f : *x;
      for (int g = 0; g < kAdjointGroup; ++g) {
        const AdjointNonzero nonzero = drawn[g * kAdjointRows + r];
        if (nonzero.place >= 0) sum += nonzero.sign * p.y[nonzero.place * p.cols + col + c];
      }
      *x = e + kAdjointGroup < nonzeros ? sum : p.scale * sum;
    }
    __syncthreads();
  }
}

// Four columns of one nonzero a thread.
__global__ void __launch_bounds__(kThreads)
    sparse_sketch_entries_kernel(const SparseEntriesArgs p, int64_t quads) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t e = unit / quads;
  if (e >= p.op.count * p.op.nnz) return;
  const int64_t column = (unit - e * quads) * 4 - p.op.col_offset % 4;
  const Nonzeros own(p.op, static_cast<uint32_t>(e), p.op.col_offset + column);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < 0 || column + i >= p.cols) continue;
    p.rows[e * p.cols + column + i] = own.row(i);
    p.signs[e * p.cols + column + i] = static_cast<int8_t>(own.negative(i) ? -1 : 1);
  }
}

}  // namespace randfuse::cuda
