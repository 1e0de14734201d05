// Walks a (rows, cols) matrix of decisions in groups of 64 stream columns. Included like simd.h.
//
// Ranges are over groups, row-major, so that one long row and many short ones are shared out alike;
// no result depends on the split.

inline int64_t groups_per_row(int64_t cols, int64_t col_offset) {
  if (cols == 0) return 0;
  return (col_offset + cols - 1) / kGroup - col_offset / kGroup + 1;
}

inline Row stream_row(const MaskStream& m, int64_t r) {
  return row_of(static_cast<uint64_t>(m.keys[r / m.rows_per_key]),
                static_cast<uint32_t>(m.row_offset + r % m.rows_per_key), m.sample, m.domain);
}

// Decisions of the g-th group of a row.
inline Keep keep_group(const Row& row, int64_t col_offset, int64_t g, uint32_t threshold) {
  if (threshold == kDropAll) return Keep{};  // 17 bits: does not fit the 16-bit comparison
  if (threshold == 0) {                      // draws nothing
    Keep all_kept;
    std::memset(&all_kept, 0xFF, sizeof all_kept);
    return all_kept;
  }
  return keep64(row, static_cast<uint32_t>((col_offset / kGroup + g) * (kGroup / kMaskLanes)),
                threshold);
}

// Columns [start + skip, start + skip + n) of a row are decisions [skip, skip + n) of a group;
// inside a row skip is 0 and n is 64, at its ends start may be negative.
struct Span {
  int64_t start;
  int skip, n;
};

inline Span span_of(int64_t cols, int64_t col_offset, int64_t g) {  // g-th group of a row
  const int64_t start = (col_offset / kGroup + g) * kGroup - col_offset;
  const int64_t first = start > 0 ? start : 0;
  const int64_t stop = start + kGroup < cols ? start + kGroup : cols;
  return {start, static_cast<int>(first - start), static_cast<int>(stop - first)};
}

// Calls body(r, g, span) for each group in [begin, end).
template <class Body>
inline void walk_groups(int64_t cols, int64_t col_offset, int64_t begin, int64_t end, Body&& body) {
  if (begin >= end) return;
  const int64_t per_row = groups_per_row(cols, col_offset);
  int64_t r = begin / per_row, g = begin % per_row;
  for (int64_t flat = begin; flat < end; ++flat) {
    body(r, g, span_of(cols, col_offset, g));
    if (++g == per_row) {
      g = 0;
      ++r;
    }
  }
}

// body(r, c, skip, n, keep): c the first column, the decisions drawn.
template <class Body>
inline void for_each_group(const MaskStream& m, int64_t cols, uint32_t threshold, int64_t begin,
                           int64_t end, Body&& body) {
  int64_t current = -1;
  Row row{};
  walk_groups(cols, m.col_offset, begin, end, [&](int64_t r, int64_t g, const Span& s) {
    if (r != current) {
      row = stream_row(m, r);
      current = r;
    }
    body(r, s.start + s.skip, s.skip, s.n, keep_group(row, m.col_offset, g, threshold));
  });
}

// Runs full(in, out) on whole groups and, through a buffer, on the ragged ones at the ends of a
// row.
template <class T, class Full>
inline void on_group(const T* in, T* out, int skip, int n, Full&& full) {
  if (n == kGroup) {
    full(in, out);
    return;
  }
  T buffer[kGroup] = {};
  std::memcpy(buffer + skip, in, n * sizeof(T));
  full(buffer, buffer);
  std::memcpy(out, buffer + skip, n * sizeof(T));
}
