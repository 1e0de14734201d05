namespace randfuse::RF_ISA {
#include "simd.h"
// lanes.h builds on simd.h
#include "lanes.h"

constexpr int64_t kBatch = cpu::kSketchBatch;

// Words of nonzero t of operator k for the kBatch columns around `column`.
inline void draw(const SparseOperator& op, int64_t k, int64_t t, int64_t column, uint32_t* words) {
  const uint64_t number = static_cast<uint64_t>(column / kBatch) * (kBatch / 4);
  const Row row =
      row_of(static_cast<uint64_t>(op.keys[k]), static_cast<uint32_t>(number >> 32),
             static_cast<uint32_t>(t), domain_word(static_cast<uint32_t>(Op::kSketchIndex), 5));
  for (int64_t l = 0; l < kBatch; l += 32) {
    words32(row, static_cast<uint32_t>(number) + static_cast<uint32_t>(l / 4), words + l);
  }
}

// Nonzero e = k * nnz + t of a run of at most kBatch columns that does not cross a multiple of
// kBatch. Two arrays and no branch, so that they are made by registers.
inline void list_run(const SparseOperator& op, int64_t e, int64_t begin, int64_t count,
                     cpu::NonzeroList out) {
  const int64_t column = op.col_offset + begin, t = e % op.nnz;
  alignas(64) uint32_t words[kBatch];
  draw(op, e / op.nnz, t, column, words);
  const uint32_t first = first_row(op.d, op.nnz, t);
  const uint32_t size = first_row(op.d, op.nnz, t + 1) - first;
  const uint32_t shifted = first - static_cast<uint32_t>(op.row_begin);  // rows before wrap around
  const uint32_t* const from = words + column % kBatch;
  for (int64_t c = 0; c < count; ++c) {
    out.rows[c] = nonzero_row(from[c], shifted, size);
    out.signs[c] = nonzero_sign(from[c]);
  }
}

// body(begin, count): the columns [begin, begin + count) of the operator's block, run by run.
template <class Body>
inline void for_each_run(const SparseOperator& op, int64_t begin, int64_t end, Body&& body) {
  while (begin < end) {
    const int64_t left = kBatch - (op.col_offset + begin) % kBatch;
    const int64_t count = left < end - begin ? left : end - begin;
    body(begin, count);
    begin += count;
  }
}

// The nonzeros of a run by columns: a piece of a row of A stays in registers while it is added to
// all the sums that it belongs to.
struct Run {
  cpu::NonzeroList lists;  // nonzero e of column c at e * kBatch + c
  int64_t count, nnz, rows;

  Run(const SparseOperator& op, int64_t begin, int64_t columns, cpu::NonzeroList buffer)
      : lists(buffer), count(op.count), nnz(op.nnz), rows(op.rows()) {
    for (int64_t e = 0; e < count * nnz; ++e) {
      list_run(op, e, begin, columns, {lists.rows + e * kBatch, lists.signs + e * kBatch});
    }
  }

  // body(row among the rows of all Y_k, sign) for the nonzeros of column c that lie in the block.
  template <class Body>
  void column(int64_t c, Body&& body) const {
    int64_t at = c;
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t t = 0; t < nnz; ++t, at += kBatch) {
        if (lists.rows[at] < rows) body(k * rows + lists.rows[at], lists.signs[at]);
      }
    }
  }
};

// [0, n) in steps of four registers, of one, of an element.
template <class S, class Body4, class Body1, class Body>
inline void by_registers(int64_t n, Body4&& four, Body1&& one, Body&& element) {
  int64_t l = 0;
  for (; l + 4 * kLanes<S> <= n; l += 4 * kLanes<S>) four(l);
  for (; l + kLanes<S> <= n; l += kLanes<S>) one(l);
  for (; l < n; ++l) element(l);
}

// sums[row] += sign * x for all nonzeros of one column.
template <class S>
inline void scatter(const Run& run, int64_t c, const S* x, S* sums, int64_t stride, int64_t n) {
  constexpr int64_t L = kLanes<S>;
  by_registers<S>(
      n,
      [&](int64_t l) {
        const auto x0 = load(x + l), x1 = load(x + l + L), x2 = load(x + l + 2 * L),
                   x3 = load(x + l + 3 * L);
        run.column(c, [&](int64_t row, float s) {
          S* const y = sums + row * stride + l;
          const auto sign = broadcast(static_cast<S>(s));
          store(y, fma(sign, x0, load(y)));
          store(y + L, fma(sign, x1, load(y + L)));
          store(y + 2 * L, fma(sign, x2, load(y + 2 * L)));
          store(y + 3 * L, fma(sign, x3, load(y + 3 * L)));
        });
      },
      [&](int64_t l) {
        run.column(c, [&](int64_t row, float s) {
          S* const y = sums + row * stride + l;
          store(y, fma(broadcast(static_cast<S>(s)), load(x + l), load(y)));
        });
      },
      [&](int64_t l) {
        run.column(c, [&](int64_t row, float sign) { sums[row * stride + l] += sign * x[l]; });
      });
}

// The same for all columns of a run where each has one element, which shares its nonzeros with no
// other: rows and terms are made by registers. A sum gets its terms in the same order.
template <class S>
inline void scatter_one(const SparseOperator& op, int64_t begin, int64_t count, const S* x,
                        int64_t x_stride, S* sums, int64_t stride) {
  const int64_t column = op.col_offset + begin, skip = column % kBatch;
  for (int64_t e = 0; e < op.count * op.nnz; ++e) {
    alignas(64) uint32_t words[kBatch], rows[kBatch];
    alignas(64) S terms[kBatch];
    const int64_t k = e / op.nnz, t = e % op.nnz;
    draw(op, k, t, column, words);
    const uint32_t first = first_row(op.d, op.nnz, t);
    const uint32_t size = first_row(op.d, op.nnz, t + 1) - first;
    for (int64_t c = 0; c < count; ++c) {
      rows[c] = static_cast<uint32_t>(nonzero_row(words[skip + c], first, size));
      terms[c] = nonzero_sign(words[skip + c]) * x[c * x_stride];
    }
    S* const y = sums + k * op.rows() * stride;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t row = static_cast<int64_t>(rows[c]) - op.row_begin;
      if (row >= 0 && row < op.rows()) y[row * stride] += terms[c];
    }
  }
}

// x = scale * sum of sign * y[row] over the nonzeros of one column.
template <class S>
inline void gather(const Run& run, int64_t c, const S* y, S* x, int64_t n, S scale) {
  constexpr int64_t L = kLanes<S>;
  const auto zero = broadcast(S{0}), factor = broadcast(scale);
  by_registers<S>(
      n,
      [&](int64_t l) {
        auto x0 = zero, x1 = zero, x2 = zero, x3 = zero;
        run.column(c, [&](int64_t row, float s) {
          const S* const from = y + row * n + l;
          const auto sign = broadcast(static_cast<S>(s));
          x0 = fma(sign, load(from), x0);
          x1 = fma(sign, load(from + L), x1);
          x2 = fma(sign, load(from + 2 * L), x2);
          x3 = fma(sign, load(from + 3 * L), x3);
        });
        store(x + l, fma(factor, x0, zero));
        store(x + l + L, fma(factor, x1, zero));
        store(x + l + 2 * L, fma(factor, x2, zero));
        store(x + l + 3 * L, fma(factor, x3, zero));
      },
      [&](int64_t l) {
        auto sum = zero;
        run.column(c, [&](int64_t row, float s) {
          sum = fma(broadcast(static_cast<S>(s)), load(y + row * n + l), sum);
        });
        store(x + l, fma(factor, sum, zero));
      },
      [&](int64_t l) {
        S sum = 0;
        run.column(c, [&](int64_t row, float sign) { sum += sign * y[row * n + l]; });
        x[l] = scale * sum;
      });
}

// Rows [row, row + rows) of columns [col, col + cols) of A as rows of `stride` sums; what is beyond
// `cols` is left as it is.
template <class T>
inline void copy_columns(const cpu::SparseSketchArgs<T>& a, int64_t row, int64_t rows, int64_t col,
                         int64_t cols, SumOf<T>* to, int64_t stride) {
  const T* from = a.a + row * a.row_stride + col * a.col_stride;
  if (a.col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) widen(from + r * a.row_stride, 1, to + r * stride, cols);
    return;
  }
  // A cache line of the copy at a time, of as many columns that are read along.
  constexpr int64_t kLine = 64 / sizeof(SumOf<T>);
  for (int64_t c = 0; c < cols; c += kLine) {
    const int64_t end = c + kLine < cols ? c + kLine : cols;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t l = c; l < end; ++l) {
        to[r * stride + l] = to_float(from[l * a.col_stride + r * a.row_stride]);
      }
    }
  }
}

// Rows of A as contiguous rows of Sum: A itself where it is that already, else a copy.
template <class T>
struct Batch {
  using Sum = SumOf<T>;
  const Sum* data;
  int64_t stride;

  Batch(const cpu::SparseSketchArgs<T>& a, int64_t row, int64_t rows, int64_t col, int64_t cols,
        Sum* buffer) {
    if constexpr (std::is_same_v<T, Sum>) {
      if (a.col_stride == 1) {
        data = a.a + row * a.row_stride + col;
        stride = a.row_stride;
        return;
      }
    }
    copy_columns(a, row, rows, col, cols, buffer, cols);
    data = buffer;
    stride = cols;
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

// A tile whose nonzeros are taken by number, kNumberBatch rows of A at a time.
template <class T>
inline void tile_by_number(const cpu::SparseSketchArgs<T>& a, const Tile& tile, SumOf<T>* buffer,
                           cpu::NonzeroList list, SumOf<T>* sums) {
  using S = SumOf<T>;
  constexpr int64_t kWidth = cpu::kNarrowBytes / sizeof(S);
  for (int64_t row = tile.row; row < tile.row_end; row += cpu::kNumberBatch) {
    const int64_t left = tile.row_end - row;
    const int64_t rows = left < cpu::kNumberBatch ? left : cpu::kNumberBatch;
    copy_columns(a, row, rows, tile.col, tile.cols, buffer, kWidth);
    for (int64_t e = 0; e < a.op.count * a.op.nnz; ++e) {
      for_each_run(a.op, row, row + rows, [&](int64_t begin, int64_t count) {
        list_run(a.op, e, begin, count, {list.rows + begin - row, list.signs + begin - row});
      });
      S* const own = sums + e / a.op.nnz * a.op.rows() * kWidth;
      for (int64_t r = 0; r < rows; ++r) {
        if (list.rows[r] >= a.op.rows()) continue;
        const S* const x = buffer + r * kWidth;
        S* const y = own + int64_t{list.rows[r]} * kWidth;
        const auto sign = broadcast(static_cast<S>(list.signs[r]));
#pragma GCC unroll 8
        for (int64_t l = 0; l < kWidth; l += kLanes<S>) {
          store(y + l, fma(sign, load(x + l), load(y + l)));
        }
      }
    }
  }
}

template <class T>
void sparse_sketch(const cpu::SparseSketchArgs<T>& a, SumOf<T>* buffer, cpu::NonzeroList lists,
                   int64_t begin, int64_t end) {
  const int64_t out_rows = a.op.count * a.op.rows(), width = a.tiles.width;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(a.tiles, a.rows, a.cols, out_rows, index);
    SumOf<T>* sums = a.sums + tile.first_sum;
    std::memset(sums, 0, sizeof(SumOf<T>) * static_cast<size_t>(out_rows * width));
    if (a.tiles.by_number) {
      tile_by_number(a, tile, buffer, lists, sums);
      continue;
    }
    for_each_run(a.op, tile.row, tile.row_end, [&](int64_t row, int64_t count) {
      const Batch<T> batch(a, row, count, tile.col, tile.cols, buffer);
      if (tile.cols == 1)
        return scatter_one(a.op, row, count, batch.data, batch.stride, sums, width);
      const Run run(a.op, row, count, lists);
      for (int64_t c = 0; c < count; ++c) {
        scatter(run, c, batch.data + c * batch.stride, sums, width, tile.cols);
      }
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
void csr_sketch(const cpu::CsrSketchArgs<T>& a, cpu::NonzeroList lists, int64_t begin,
                int64_t end) {
  const int64_t out_rows = a.op.count * a.op.rows(), width = a.tiles.width;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(a.tiles, a.rows, a.cols, out_rows, index);
    SumOf<T>* sums = a.sums + tile.first_sum;
    std::memset(sums, 0, sizeof(SumOf<T>) * static_cast<size_t>(out_rows * width));
    for_each_run(a.op, tile.row, tile.row_end, [&](int64_t row, int64_t count) {
      const Run run(a.op, row, count, lists);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t stop = a.crow[row + c + 1], last = tile.col + tile.cols;
        for (int64_t p = lower_bound(a.col, a.crow[row + c], stop, tile.col);
             p < stop && a.col[p] < last; ++p) {
          SumOf<T>* y = sums + a.col[p] - tile.col;
          run.column(
              c, [&](int64_t row, float sign) { y[row * width] += sign * to_float(a.values[p]); });
        }
      }
    });
  }
}

template <class Sum>
void sketch_sums(const cpu::SketchSumArgs<Sum>& a, int64_t begin, int64_t end) {
  const int64_t width = a.tiles.width, chunk = a.tiles.strips * a.out_rows * width;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t strip = 0; strip < a.tiles.strips; ++strip) {
      const int64_t left = a.cols - strip * width, n = left < width ? left : width;
      const Sum* sums = a.sums + (strip * a.out_rows + r) * width;
      Sum* y = a.y + r * a.cols + strip * width;
      std::memcpy(y, sums, sizeof(Sum) * static_cast<size_t>(n));
      for (int64_t k = 1; k < a.tiles.chunks; ++k) {
        for (int64_t l = 0; l < n; ++l) y[l] += sums[k * chunk + l];
      }
      for (int64_t l = 0; l < n; ++l) y[l] *= a.scale;
    }
  }
}

template <class Sum>
void sparse_sketch_adjoint(const cpu::SparseAdjointArgs<Sum>& a, cpu::NonzeroList lists,
                           int64_t begin, int64_t end) {
  for_each_run(a.op, begin, end, [&](int64_t row, int64_t count) {
    const Run run(a.op, row, count, lists);
    for (int64_t c = 0; c < count; ++c) {
      gather(run, c, a.y, a.x + (row + c) * a.cols, a.cols, a.scale);
    }
  });
}

inline void sparse_sketch_entries(const cpu::SparseEntriesArgs& a, int64_t begin, int64_t end) {
  uint32_t rows[kBatch];
  float signs[kBatch];
  for_each_run(a.op, begin, end, [&](int64_t column, int64_t count) {
    for (int64_t e = 0; e < a.op.count * a.op.nnz; ++e) {
      list_run(a.op, e, column, count, {rows, signs});
      for (int64_t c = 0; c < count; ++c) {
        a.rows[e * a.cols + column + c] = rows[c];
        a.signs[e * a.cols + column + c] = static_cast<int8_t>(signs[c]);
      }
    }
  });
}

}  // namespace randfuse::RF_ISA
