// Blocks of random words at coordinates that differ from element to element: derived keys
// (fold_in), and the coins and clocks of masked-diffusion steps, where every sequence has a key.
//
// Bytes: 24 read and 16 written a block; ten rounds of Philox outweigh them 4 to 1 on an AVX-512
// core.
#pragma once
#include <cstdint>

#include "../common/streams.h"

namespace randfuse::cpu {

// Element n: the words r0 | r1 << 32 and r2 | r3 << 32 of block number[n], whose low half is j and
// whose high half is i, of sub-stream sample[n] under key[n].
struct RandomWordsArgs {
  const int64_t *key, *number, *sample;
  uint32_t domain;
  int64_t *low, *high;
};

void random_words(const RandomWordsArgs& args, int64_t begin, int64_t end);

}  // namespace randfuse::cpu
