// `count` different numbers below `population`, every ordered choice equally likely (Fisher,
// Yates): step t swaps place t with place t + floor(u (population - t) / 2^64), u a 64-bit word of
// domain 19. Only places that have been swapped are held: O(count) time and memory for any
// population.
#pragma once
#include <cstdint>

#include "../common/sketch.h"

namespace randfuse::cpu {

void distinct_rows(uint64_t key, uint32_t substream, int64_t population, int64_t count,
                   int64_t* rows);

}  // namespace randfuse::cpu
