namespace randfuse::RF_ISA {
#include "simd.h"

constexpr int64_t kBatch = cpu::kSketchBatch;

// The nonzeros of a run of at most kBatch columns that does not cross a multiple of kBatch.
struct Draws {
  alignas(64) uint32_t words[kBatch];
  uint32_t first, size;  // rows that this nonzero may lie in
  int64_t skip;          // where the run begins in the words

  void draw(const cpu::SparseOperator& op, int64_t k, int64_t t, int64_t column) {
    const uint64_t number = static_cast<uint64_t>(column / kBatch) * (kBatch / 4);
    const Row row =
        row_of(static_cast<uint64_t>(op.keys[k]), static_cast<uint32_t>(number >> 32),
               static_cast<uint32_t>(t), domain_word(static_cast<uint32_t>(Op::kSketchIndex), 5));
    for (int64_t l = 0; l < kBatch; l += 32) {
      words32(row, static_cast<uint32_t>(number) + static_cast<uint32_t>(l / 4), words + l);
    }
    first = first_row(op.d, op.nnz, t);
    size = first_row(op.d, op.nnz, t + 1) - first;
    skip = column % kBatch;
  }
  int64_t row(int64_t c) const { return nonzero_row(words[skip + c], first, size); }
  float sign(int64_t c) const { return nonzero_sign(words[skip + c]); }
};

// body(begin, count): the columns [begin, begin + count) of the operator's block, run by run.
template <class Body>
inline void for_each_run(const cpu::SparseOperator& op, int64_t begin, int64_t end, Body&& body) {
  while (begin < end) {
    const int64_t left = kBatch - (op.col_offset + begin) % kBatch;
    const int64_t count = left < end - begin ? left : end - begin;
    body(begin, count);
    begin += count;
  }
}

// body(out, c, sign): nonzero of column c of the run, in row `out` of all the Y_k together.
template <class Body>
inline void for_each_nonzero(const cpu::SparseOperator& op, int64_t begin, int64_t count,
                             Body&& body) {
  Draws draws;
  for (int64_t k = 0; k < op.count; ++k) {
    for (int64_t t = 0; t < op.nnz; ++t) {
      draws.draw(op, k, t, op.col_offset + begin);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t row = draws.row(c) - op.row_begin;
        if (row >= 0 && row < op.rows()) body(k * op.rows() + row, c, draws.sign(c));
      }
    }
  }
}

// y += sign * x; sixteen at a time, so that the compiler emits whole registers.
template <class Sum>
inline void add_signed(Sum* __restrict y, const Sum* __restrict x, Sum sign, int64_t n) {
  int64_t l = 0;
  for (; l + 16 <= n; l += 16) {
#pragma GCC unroll 16
    for (int v = 0; v < 16; ++v) y[l + v] += sign * x[l + v];
  }
  for (; l < n; ++l) y[l] += sign * x[l];
}

// Rows of A as contiguous rows of Sum: A itself where it is that already, else a copy.
template <class T>
struct Batch {
  using Sum = SumOf<T>;
  const Sum* data;
  int64_t stride;

  Batch(const cpu::SparseSketchArgs<T>& a, int64_t row, int64_t rows, int64_t col, int64_t cols,
        Sum* buffer) {
    const T* from = a.a + row * a.row_stride + col * a.col_stride;
    if constexpr (std::is_same_v<T, Sum>) {
      if (a.col_stride == 1) {
        data = from;
        stride = a.row_stride;
        return;
      }
    }
    data = buffer;
    stride = cols;
    if (a.col_stride == 1) {
      for (int64_t r = 0; r < rows; ++r) widen(from + r * a.row_stride, buffer + r * cols, cols);
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        const T* column = from + c * a.col_stride;
        for (int64_t r = 0; r < rows; ++r)
          buffer[r * cols + c] = to_float(column[r * a.row_stride]);
      }
    }
  }

  static void widen(const T* in, Sum* out, int64_t n) {
    int64_t l = 0;
    if constexpr (std::is_same_v<Sum, float>) {
      for (; l + kF32 <= n; l += kF32) store(out + l, load(in + l));
    }
    for (; l < n; ++l) out[l] = to_float(in[l]);
  }
};

struct Tile {
  int64_t row, row_end, col, cols, first_sum;
};

inline Tile tile_of(const cpu::SketchTiles& t, int64_t rows, int64_t cols, int64_t out_rows,
                    int64_t index) {
  const int64_t row = index / t.strips * t.chunk_rows, col = index % t.strips * t.width;
  const int64_t row_end = row + t.chunk_rows < rows ? row + t.chunk_rows : rows;
  const int64_t width = col + t.width < cols ? t.width : cols - col;
  return {row, row_end, col, width, index * out_rows * t.width};
}

template <class T>
void sparse_sketch(const cpu::SparseSketchArgs<T>& a, SumOf<T>* buffer, int64_t begin,
                   int64_t end) {
  const int64_t out_rows = a.op.count * a.op.rows(), width = a.tiles.width;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(a.tiles, a.rows, a.cols, out_rows, index);
    SumOf<T>* sums = a.sums + tile.first_sum;
    std::memset(sums, 0, sizeof(SumOf<T>) * static_cast<size_t>(out_rows * width));
    for_each_run(a.op, tile.row, tile.row_end, [&](int64_t row, int64_t count) {
      const Batch<T> batch(a, row, count, tile.col, tile.cols, buffer);
      for_each_nonzero(a.op, row, count, [&](int64_t out, int64_t c, float sign) {
        add_signed<SumOf<T>>(sums + out * width, batch.data + c * batch.stride, sign, tile.cols);
      });
    });
  }
}

// First place of [begin, end) whose column is not below `col`.
inline int64_t lower_bound(const int64_t* cols, int64_t begin, int64_t end, int64_t col) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (cols[middle] < col) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

template <class T>
void csr_sketch(const cpu::CsrSketchArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t out_rows = a.op.count * a.op.rows(), width = a.tiles.width;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(a.tiles, a.rows, a.cols, out_rows, index);
    SumOf<T>* sums = a.sums + tile.first_sum;
    std::memset(sums, 0, sizeof(SumOf<T>) * static_cast<size_t>(out_rows * width));
    for_each_run(a.op, tile.row, tile.row_end, [&](int64_t row, int64_t count) {
      for_each_nonzero(a.op, row, count, [&](int64_t out, int64_t c, float sign) {
        const int64_t stop = a.crow[row + c + 1], last = tile.col + tile.cols;
        SumOf<T>* y = sums + out * width - tile.col;
        for (int64_t p = lower_bound(a.col, a.crow[row + c], stop, tile.col);
             p < stop && a.col[p] < last; ++p) {
          y[a.col[p]] += sign * to_float(a.values[p]);
        }
      });
    });
  }
}

template <class Sum>
void sketch_sums(const cpu::SketchSumArgs<Sum>& a, int64_t begin, int64_t end) {
  const int64_t chunk = a.tiles.strips * a.out_rows * a.tiles.width;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < a.cols; ++c) {
      const int64_t strip = c / a.tiles.width;
      const Sum* sums = a.sums + (strip * a.out_rows + r) * a.tiles.width + c % a.tiles.width;
      Sum total = sums[0];
      for (int64_t k = 1; k < a.tiles.chunks; ++k) total += sums[k * chunk];
      a.y[r * a.cols + c] = a.scale * total;
    }
  }
}

template <class Sum>
void sparse_sketch_adjoint(const cpu::SparseAdjointArgs<Sum>& a, int64_t begin, int64_t end) {
  for_each_run(a.op, begin, end, [&](int64_t row, int64_t count) {
    Sum* x = a.x + row * a.cols;
    std::memset(x, 0, sizeof(Sum) * static_cast<size_t>(count * a.cols));
    for_each_nonzero(a.op, row, count, [&](int64_t out, int64_t c, float sign) {
      add_signed<Sum>(x + c * a.cols, a.y + out * a.cols, sign * a.scale, a.cols);
    });
  });
}

inline void sparse_sketch_entries(const cpu::SparseEntriesArgs& a, int64_t begin, int64_t end) {
  Draws draws;
  for_each_run(a.op, begin, end, [&](int64_t column, int64_t count) {
    for (int64_t e = 0; e < a.op.count * a.op.nnz; ++e) {
      draws.draw(a.op, e / a.op.nnz, e % a.op.nnz, a.op.col_offset + column);
      for (int64_t c = 0; c < count; ++c) {
        a.rows[e * a.cols + column + c] = draws.row(c);
        a.signs[e * a.cols + column + c] = static_cast<int8_t>(draws.sign(c));
      }
    }
  });
}

}  // namespace randfuse::RF_ISA
