// Walks a (rows, cols) matrix of decisions in groups of 64 stream columns. Included like simd.h.
//
// Ranges are over groups, row-major, so that one long row and many short ones are shared out alike;
// no result depends on the split.

inline int64_t groups_per_row(int64_t cols, int64_t col_offset) {
  if (cols == 0) return 0;
  return (col_offset + cols - 1) / kGroup - col_offset / kGroup + 1;
}

// Decisions of stream columns [64*group, 64*group + 64) of row r.
inline Keep keep_group(const MaskStream& m, int64_t r, int64_t group, uint32_t threshold) {
  return keep64(static_cast<uint64_t>(m.keys[r / m.rows_per_key]),
                static_cast<uint32_t>(m.row_offset + r % m.rows_per_key),
                static_cast<uint32_t>(group * (kGroup / kMaskLanes)), m.sample, m.domain, threshold);
}

// Calls body(r, c, skip, n, group) for each group in [begin, end): columns [c, c + n) of row r are
// decisions [skip, skip + n) of the group; inside a row skip is 0 and n is 64.
template <class Body>
inline void walk_groups(const MaskStream& m, int64_t cols, int64_t begin, int64_t end, Body&& body) {
  const int64_t per_row = groups_per_row(cols, m.col_offset), first = m.col_offset / kGroup;
  if (begin >= end) return;
  int64_t r = begin / per_row, g = begin % per_row;
  for (int64_t flat = begin; flat < end; ++flat) {
    const int64_t start = (first + g) * kGroup - m.col_offset;  // column of decision 0, may be < 0
    const int64_t c = start > 0 ? start : 0;
    const int64_t stop = start + kGroup < cols ? start + kGroup : cols;
    body(r, c, static_cast<int>(c - start), static_cast<int>(stop - c), first + g);
    if (++g == per_row) {
      g = 0;
      ++r;
    }
  }
}

// body(r, c, skip, n, keep), with the decisions drawn.
template <class Body>
inline void for_each_group(const MaskStream& m, int64_t cols, uint32_t threshold, int64_t begin,
                           int64_t end, Body&& body) {
  walk_groups(m, cols, begin, end, [&](int64_t r, int64_t c, int skip, int n, int64_t group) {
    body(r, c, skip, n, keep_group(m, r, group, threshold));
  });
}

// body(r, c, n): the same walk without drawing, for p = 0 and p = 1.
template <class Body>
inline void for_each_span(const MaskStream& m, int64_t cols, int64_t begin, int64_t end, Body&& body) {
  walk_groups(m, cols, begin, end,
              [&](int64_t r, int64_t c, int, int n, int64_t) { body(r, c, n); });
}

// Runs full(in, out) on whole groups and, through a buffer, on the ragged ones at the ends of a row.
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
