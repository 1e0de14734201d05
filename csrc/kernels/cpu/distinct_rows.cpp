#include "distinct_rows.h"

#include <unordered_map>

namespace randfuse::cpu {

void distinct_rows(uint64_t key, uint32_t substream, int64_t population, int64_t count,
                   int64_t* rows) {
  constexpr uint32_t kDomain = domain_word(static_cast<uint32_t>(Op::kSketchPermutation), 6);
  std::unordered_map<int64_t, int64_t> moved;  // place -> number, where they differ
  moved.reserve(static_cast<size_t>(2 * count));
  const auto number_at = [&](int64_t place) {
    const auto found = moved.find(place);
    return found == moved.end() ? place : found->second;
  };
  for (int64_t t = 0; t < count; ++t) {
    const Words w = long_block<kWordRounds>(key, static_cast<uint64_t>(t / 2), substream, kDomain);
    const uint32_t low = w.r[t % 2 * 2], high = w.r[t % 2 * 2 + 1];
    // (high 2^32 + low) n / 2^64, with n below 2^32.
    const uint64_t n = static_cast<uint64_t>(population - t);
    const uint64_t step = (high * n + (low * n >> 32)) >> 32;
    const int64_t place = t + static_cast<int64_t>(step);
    rows[t] = number_at(place);
    moved[place] = number_at(t);
  }
}

}  // namespace randfuse::cpu
