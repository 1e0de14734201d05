// The structured choice: which k of n blocks a row of blocks keeps, exactly k, all subsets alike.
#pragma once
#include <cstdint>

#include "../common/streams.h"

namespace randfuse::cpu {

// Row r of group g reads key keys[g] as row i = row_offset + r. It keeps the `kept` blocks with the
// smallest words, ties to the lowest index, and one more if its coin is below `coin`.
struct KeptBlocksArgs {
  const int64_t* keys;  // (groups,)
  int64_t rows;         // of blocks, a group
  int64_t row_offset;
  int64_t n, kept, coin;  // blocks of a row; kept < n where there is a coin, which is in [0, 2^32)
  uint32_t role;
  int64_t* out;  // (groups * rows, kept + (coin > 0)) ascending; n in the last place: none
};

void kept_blocks(const KeptBlocksArgs& args, int64_t row_begin, int64_t row_end);

}  // namespace randfuse::cpu
