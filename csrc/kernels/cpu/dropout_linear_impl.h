namespace randfuse::RF_ISA {
#include "simd.h"
// mask_rows.h builds on simd.h
#include "mask_rows.h"

constexpr int kTile = 16;   // rows of X masked at a time
constexpr int kPanel = 16;  // columns of weight_t taken at a time; padded_n is a multiple

// The register tile of the micro-product: rows x vectors, sized for 16 (SSE, AVX2) or 32 registers.
#if RF_LEVEL == RF_AVX512
constexpr int kRows = 4, kVectors = 4;
#elif RF_LEVEL == RF_AVX2
constexpr int kRows = 4, kVectors = 2;
#else
constexpr int kRows = 2, kVectors = 4;
#endif

// c (R, V vectors) += sum over l of a[r * a_row + l * a_step] * b[l * b_row + ...], accumulated in
// registers.
template <int R, int V>
inline void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                    int64_t count, float* c, int64_t c_row) {
  F32 sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = broadcast(0.0f);
  }
  for (int64_t l = 0; l < count; ++l) {
    F32 row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) row[v] = load(b + l * b_row + v * kF32);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F32 factor = broadcast(a[r * a_row + l * a_step]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = fma(factor, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_row + v * kF32;
      store(to, add(load(to), sum[r][v]));
    }
  }
}

// tile (kTile, kGroup) = mask(X) of rows [r0, r0 + rows) in group g, unscaled, zeros below the last
// row.
template <class T, class Out>
inline void mask_tile(const cpu::DropoutLinearArgs<T, Out>& a, const Row* row, int64_t r0,
                      int64_t rows, int64_t g, const Span& span, float* tile) {
  for (int64_t r = 0; r < rows; ++r) {
    const Keep keep = keep_group(row[r], a.stream.col_offset, g, a.rate.threshold);
    const T* x = a.x + (r0 + r) * a.x_stride + span.start;
    T ragged[kGroup] = {};
    if (span.n != kGroup) {
      std::memcpy(ragged + span.skip, x + span.skip, span.n * sizeof(T));
      x = ragged;
    }
#pragma GCC unroll 16
    for (int v = 0; v < kGroup / kF32; ++v) {
      store(tile + r * kGroup + v * kF32, kept(keep, v, load(x + v * kF32)));
    }
  }
  if (rows < kTile) std::memset(tile + rows * kGroup, 0, (kTile - rows) * kGroup * sizeof(float));
}

template <class T, class Out>
void dropout_linear(const cpu::DropoutLinearArgs<T, Out>& a, int64_t begin, int64_t end) {
  alignas(64) float tile[kTile * kGroup];           // (rows, columns of x)
  alignas(64) float sums[kTile * cpu::kMaxNarrow];  // (rows, columns of y)
  const int64_t groups = groups_per_row(a.k, a.stream.col_offset), width = cpu::padded_n(a.n);
  const float scale = static_cast<float>(a.rate.scale);
  for (int64_t r0 = begin; r0 < end; r0 += kTile) {
    const int64_t rows = end - r0 < kTile ? end - r0 : kTile;
    Row row[kTile];
    for (int64_t r = 0; r < rows; ++r) row[r] = stream_row(a.stream, r0 + r);
    std::memset(sums, 0, kTile * width * sizeof(float));
    for (int64_t g = 0; g < groups; ++g) {
      const Span span = span_of(a.k, a.stream.col_offset, g);
      mask_tile(a, row, r0, rows, g, span, tile);
      const float* weight = a.weight_t + (span.start + span.skip) * width;
      for (int64_t n = 0; n < width;) {
#if RF_LEVEL == RF_AVX512
        if (width - n <
            2 * kPanel) {  // one vector wide: more rows keep the two multiply-add units busy
          product<16, 1>(tile + span.skip, kGroup, 1, weight + n, width, span.n, sums + n, width);
          n += kPanel;
          continue;
        }
        constexpr int R = 8, V = 2;
#else
        constexpr int R = kRows, V = kPanel / kF32;
#endif
        for (int r = 0; r < kTile; r += R) {
          product<R, V>(tile + r * kGroup + span.skip, kGroup, 1, weight + n, width, span.n,
                        sums + r * width + n, width);
        }
        n += V * kF32;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      Out* y = a.out + (r0 + r) * a.n;
      for (int64_t n = 0; n < a.n; ++n) {
        const float bias = a.bias ? to_float(a.bias[n]) : 0.0f;
        y[n] = from_float<Out>(sums[r * width + n] * scale + bias);
      }
    }
  }
}

template <class T>
void dropout_linear_dgrad(const cpu::DropoutLinearArgs<T>& a, int64_t begin, int64_t end) {
  alignas(64) float tile[kTile * kGroup];  // (rows, columns of dx)
  const int64_t groups = groups_per_row(a.k, a.stream.col_offset), width = groups * kGroup;
  const F32 scale = broadcast(static_cast<float>(a.rate.scale));
  for (int64_t r0 = begin; r0 < end; r0 += kTile) {
    const int64_t rows = end - r0 < kTile ? end - r0 : kTile;
    Row row[kTile];
    for (int64_t r = 0; r < rows; ++r) row[r] = stream_row(a.stream, r0 + r);
    for (int64_t g = 0; g < groups; ++g) {
      const Span span = span_of(a.k, a.stream.col_offset, g);
      std::memset(tile, 0, sizeof tile);
      for (int64_t r = 0; r < rows;) {
        const float* grad = a.grad + (r0 + r) * a.n;
        const bool full = rows - r >= kRows;
        for (int v = 0; v < kGroup; v += kVectors * kF32) {
          const float* weight = a.weight + g * kGroup + v;
          float* to = tile + r * kGroup + v;
          if (full) {
            product<kRows, kVectors>(grad, a.n, 1, weight, width, a.n, to, kGroup);
          } else {
            product<1, kVectors>(grad, a.n, 1, weight, width, a.n, to, kGroup);
          }
        }
        r += full ? kRows : 1;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const Keep keep = keep_group(row[r], a.stream.col_offset, g, a.rate.threshold);
        T* dx = a.out + (r0 + r) * a.k + span.start;
        T ragged[kGroup] = {};
        T* to = span.n == kGroup ? dx : ragged;
        if (a.accumulate && span.n != kGroup) {
          std::memcpy(ragged + span.skip, dx + span.skip, span.n * sizeof(T));
        }
#pragma GCC unroll 16
        for (int v = 0; v < kGroup / kF32; ++v) {
          const F32 sum = kept(keep, v, mul(load(tile + r * kGroup + v * kF32), scale));
          store(to + v * kF32, a.accumulate ? add(load(to + v * kF32), sum) : sum);
        }
        if (span.n != kGroup) std::memcpy(dx + span.skip, ragged + span.skip, span.n * sizeof(T));
      }
    }
  }
}

// Neighbouring groups go down the rows together, as many as have room for their sums: a row's part
// of the stream is then set up once for all of them, and its page is visited once.
template <class T, class Out>
void dropout_linear_wgrad(const cpu::DropoutLinearArgs<T, Out>& a, int64_t begin, int64_t end) {
  alignas(64) float tile[kTile * kGroup];                // (rows, columns of x)
  alignas(64) float sums[2 * cpu::kMaxNarrow * kGroup];  // (groups, n, columns of x)
  const float scale = static_cast<float>(a.rate.scale);
  const int64_t room = 2 * cpu::kMaxNarrow / a.n;
  for (int64_t first = begin; first < end; first += room) {
    const int64_t groups = end - first < room ? end - first : room;
    std::memset(sums, 0, groups * a.n * kGroup * sizeof(float));
    for (int64_t r0 = 0; r0 < a.m; r0 += kTile) {
      const int64_t rows = a.m - r0 < kTile ? a.m - r0 : kTile;
      Row row[kTile];
      for (int64_t r = 0; r < rows; ++r) row[r] = stream_row(a.stream, r0 + r);
      const float* grad = a.grad + r0 * a.n;
      for (int64_t i = 0; i < groups; ++i) {
        const Span span = span_of(a.k, a.stream.col_offset, first + i);
        mask_tile(a, row, r0, rows, first + i, span, tile);
        for (int64_t n = 0; n < a.n;) {
          const bool full = a.n - n >= kRows;
          for (int v = 0; v < kGroup; v += kVectors * kF32) {
            float* to = sums + (i * a.n + n) * kGroup + v;
            if (full) {
              product<kRows, kVectors>(grad + n, 1, a.n, tile + v, kGroup, rows, to, kGroup);
            } else {
              product<1, kVectors>(grad + n, 1, a.n, tile + v, kGroup, rows, to, kGroup);
            }
          }
          n += full ? kRows : 1;
        }
      }
    }
    for (int64_t i = 0; i < groups; ++i) {
      const Span span = span_of(a.k, a.stream.col_offset, first + i);
      for (int64_t n = 0; n < a.n; ++n) {
        const float* from = sums + (i * a.n + n) * kGroup;
        Out* dw = a.out + n * a.k + span.start;
        for (int l = span.skip; l < span.skip + span.n; ++l) {
          const float sum = from[l] * scale;
          dw[l] = from_float<Out>(a.accumulate ? to_float(dw[l]) + sum : sum);
        }
      }
    }
  }
}

}  // namespace randfuse::RF_ISA
