// How sketching operators read their streams, for host and device; docs/streams.md, section 3.
//
// The long index of an operator is its column c < 2^62. Column c lies in block number b = c div L,
// whose low half is the counter word j and whose high half is i; s is the row or the nonzero.
#pragma once
#include <type_traits>

#include "streams.h"

namespace randfuse {

template <class T>  // what sums of T are held in
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Rows [row_begin, row_end) and columns from col_offset on of `count` sparse operators with d rows.
struct SparseOperator {
  const int64_t* keys;  // (count,)
  int64_t count, d, nnz, row_begin, row_end, col_offset;
  RF_HD int64_t rows() const { return row_end - row_begin; }
};

template <int kRounds>
RF_HD Words long_block(uint64_t key, uint64_t number, uint32_t s, uint32_t domain) {
  return block<kRounds>(key, static_cast<uint32_t>(number >> 32), static_cast<uint32_t>(number), s,
                        domain);
}

// A nonzero of a sparse operator is one 32-bit word: its lowest bit is the sign (1: negative), the
// other 31 choose one of `size` rows from `first` on, each with probability within 2^-31 of 1/size.
RF_HD uint32_t nonzero_row(uint32_t word, uint32_t first, uint32_t size) {
  return first + static_cast<uint32_t>(static_cast<uint64_t>(word >> 1) * size >> 31);
}
RF_HD float nonzero_sign(uint32_t word) { return word & 1u ? -1.0f : 1.0f; }

// Nonzero t of each column lies in rows [floor(t d / nnz), floor((t + 1) d / nnz)): no two in one.
RF_HD uint32_t first_row(int64_t d, int64_t nnz, int64_t t) {
  // Without a 64-bit division, which GPUs call a function for; d < 2^31, t <= nnz <= 1024.
  const uint32_t parts = static_cast<uint32_t>(nnz), index = static_cast<uint32_t>(t);
  const uint32_t whole = static_cast<uint32_t>(d) / parts, rest = static_cast<uint32_t>(d) % parts;
  return index * whole + index * rest / parts;
}

}  // namespace randfuse
