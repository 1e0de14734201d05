namespace randfuse::RF_ISA {
#include "simd.h"
// lanes.h builds on simd.h
#include "lanes.h"

#if RF_LEVEL == RF_AVX512
inline F32 square_root(F32 x) { return _mm512_sqrt_ps(x); }
constexpr int kRowsAtOnce = 8;  // with three registers of columns: 24 sums in 32 registers
#elif RF_LEVEL == RF_AVX2
inline F32 square_root(F32 x) { return _mm256_sqrt_ps(x); }
constexpr int kRowsAtOnce = 4;  // 12 sums in 16 registers
#else
constexpr int kRowsAtOnce = 4;
inline F32 square_root(F32 x) {
  for (int l = 0; l < kF32; ++l) x[l] = std::sqrt(x[l]);
  return x;
}
#endif

// 32 normals from 32 words: words l and l + 16 give normals l (cosine) and l + 16 (sine), so that
// registers of words need no shuffling.
struct Normals {
  static constexpr int kGroup = 32;
  static constexpr uint32_t kDomain = domain_word(static_cast<uint32_t>(Op::kSketchNormal), 5);

  static void draw(const Row& row, uint32_t j, float* out) {
    alignas(64) uint32_t words[kGroup];
    alignas(64) float radius[16];
    words32(row, j, words);
    for (int l = 0; l < 16; ++l) radius[l] = minus_two_log(words[l]);
    for (int l = 0; l < 16; l += kF32) store(radius + l, square_root(load(radius + l)));
    for (int l = 0; l < 16; ++l) {
      const Turn t = turn(words[16 + l]);
      out[l] = radius[l] * t.cosine;
      out[16 + l] = radius[l] * t.sine;
    }
  }
};

// 1 where the bit of a column is 0, -1 where it is 1.
inline void signs(const Words& w, float* out) {
  for (int r = 0; r < 4; ++r) {
    for (int l = 0; l < 32; ++l) {
      const uint32_t bits = 0x3F800000u | w.r[r] >> l << 31;
      std::memcpy(out + 32 * r + l, &bits, sizeof bits);
    }
  }
}

// fill(number, out): `group` entries from column group * number on. Whole groups go straight to
// `out`.
template <class Fill>
inline void fill_row(float* out, int64_t begin, int64_t cols, int64_t group, Fill&& fill) {
  alignas(64) float buffer[128];
  for (int64_t at = 0; at < cols;) {
    const int64_t number = (begin + at) / group, skip = (begin + at) % group;
    const int64_t left = group - skip, n = left < cols - at ? left : cols - at;
    if (n == group) {
      fill(number, out + at);
    } else {
      fill(number, buffer);
      std::memcpy(out + at, buffer + skip, static_cast<size_t>(n) * sizeof(float));
    }
    at += n;
  }
}

inline void dense_sketch_entries(const cpu::DenseEntriesArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const uint32_t s = static_cast<uint32_t>(a.row_begin + r);
    float* out = a.out + r * a.cols;
    if (a.family == cpu::Family::kRademacher) {
      constexpr uint32_t kDomain = domain_word(static_cast<uint32_t>(Op::kSketchSign), 0);
      fill_row(out, a.col_begin, a.cols, 128, [&](int64_t number, float* to) {
        signs(long_block<kMaskRounds>(a.key, static_cast<uint64_t>(number), s, kDomain), to);
      });
      continue;
    }
    uint32_t high = 0;  // the half of the block number that a Row fixes
    Row row = row_of(a.key, high, s, Normals::kDomain);
    fill_row(out, a.col_begin, a.cols, Normals::kGroup, [&](int64_t number, float* to) {
      const uint64_t block = static_cast<uint64_t>(number) * (Normals::kGroup / 4);
      if (static_cast<uint32_t>(block >> 32) != high) {
        high = static_cast<uint32_t>(block >> 32);
        row = row_of(a.key, high, s, Normals::kDomain);
      }
      Normals::draw(row, static_cast<uint32_t>(block), to);
    });
  }
}

template <class Sum>
constexpr int kPanel = 3 * kLanes<Sum>;

// y[r][c] += scale * sum over k of s[r * out_stride + k * k_stride] * panel[k][c], for kRows rows
// and a panel of columns, of which `cols` exist.
template <int kRows, class Sum>
inline void multiply(const float* s, int64_t out_stride, int64_t k_stride, int64_t depth,
                     const Sum* panel, Sum* y, int64_t y_stride, int64_t cols, Sum scale) {
  using V = typename VectorOf<Sum>::type;
  V sums[kRows][3];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = sums[r][2] = broadcast(Sum{0});
  for (int64_t k = 0; k < depth; ++k) {
    const Sum* row = panel + k * kPanel<Sum>;
    const V x0 = load(row), x1 = load(row + kLanes<Sum>), x2 = load(row + 2 * kLanes<Sum>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V entry = broadcast(static_cast<Sum>(s[r * out_stride + k * k_stride]));
      sums[r][0] = fma(entry, x0, sums[r][0]);
      sums[r][1] = fma(entry, x1, sums[r][1]);
      sums[r][2] = fma(entry, x2, sums[r][2]);
    }
  }
  const V factor = broadcast(scale);
  for (int r = 0; r < kRows; ++r) {
    Sum line[kPanel<Sum>] = {};
    Sum* const out = y + r * y_stride;
    std::memcpy(line, out, static_cast<size_t>(cols) * sizeof(Sum));
    for (int v = 0; v < 3; ++v) {
      Sum* const at = line + v * kLanes<Sum>;
      store(at, fma(factor, sums[r][v], load(at)));
    }
    std::memcpy(out, line, static_cast<size_t>(cols) * sizeof(Sum));
  }
}

// y (rows, n) += scale * tile x, with x (depth, n) packed panel by panel.
template <class T>
inline void tile_product(const float* tile, int64_t out_stride, int64_t k_stride, int64_t rows,
                         int64_t depth, const T* x, int64_t row_stride, int64_t col_stride,
                         int64_t n, SumOf<T>* panel, SumOf<T>* y, SumOf<T> scale) {
  using Sum = SumOf<T>;
  for (int64_t c = 0; c < n; c += kPanel<Sum>) {
    const int64_t cols = n - c < kPanel<Sum> ? n - c : kPanel<Sum>;
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = x + k * row_stride + c * col_stride;
      Sum* to = panel + k * kPanel<Sum>;
      widen(from, col_stride, to, cols);
      for (int64_t l = cols; l < kPanel<Sum>; ++l) to[l] = 0;  // not stored, but rubbish is slow
    }
    int64_t r = 0;
    for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) {
      multiply<kRowsAtOnce>(tile + r * out_stride, out_stride, k_stride, depth, panel,
                            y + r * n + c, n, cols, scale);
    }
    for (; r < rows; ++r) {
      multiply<1>(tile + r * out_stride, out_stride, k_stride, depth, panel, y + r * n + c, n, cols,
                  scale);
    }
  }
}

// Tile (rows, cols) at (row, col) of the block of operator k, rows of `cols` entries.
inline void fill_tile(const cpu::DenseOperator& op, int64_t k, int64_t row, int64_t rows,
                      int64_t col, int64_t cols, float* tile) {
  dense_sketch_entries({tile, rows, cols, op.family, static_cast<uint64_t>(op.keys[k]),
                        op.row_begin + row, op.col_offset + col},
                       0, rows);
}

template <class T>
void dense_sketch(const cpu::DenseSketchArgs<T>& a, float* tile, SumOf<T>* panel, int64_t begin,
                  int64_t end) {
  const int64_t strips = (a.op.rows() + a.step - 1) / a.step;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t k = task / strips, row = task % strips * a.step;
    const int64_t rows = a.op.rows() - row < a.step ? a.op.rows() - row : a.step;
    for (int64_t col = 0; col < a.cols; col += cpu::kTileCols) {
      const int64_t cols = a.cols - col < cpu::kTileCols ? a.cols - col : cpu::kTileCols;
      fill_tile(a.op, k, row, rows, col, cols, tile);
      tile_product(tile, cols, int64_t{1}, rows, cols, a.in + col * a.row_stride, a.row_stride,
                   a.col_stride, a.n, panel, a.out + (k * a.op.rows() + row) * a.n, a.scale);
    }
  }
}

template <class Sum>
void dense_sketch_adjoint(const cpu::DenseSketchArgs<Sum>& a, float* tile, Sum* panel,
                          int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t col = task * a.step, cols = a.cols - col < a.step ? a.cols - col : a.step;
    for (int64_t k = 0; k < a.op.count; ++k) {
      for (int64_t row = 0; row < a.op.rows(); row += cpu::kTileRows) {
        const int64_t left = a.op.rows() - row;
        const int64_t rows = left < cpu::kTileRows ? left : cpu::kTileRows;
        fill_tile(a.op, k, row, rows, col, cols, tile);
        tile_product(tile, int64_t{1}, cols, cols, rows, a.in + (k * a.op.rows() + row) * a.n, a.n,
                     int64_t{1}, a.n, panel, a.out + col * a.n, a.scale);
      }
    }
  }
}

}  // namespace randfuse::RF_ISA
