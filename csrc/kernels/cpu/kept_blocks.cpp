#include "kept_blocks.h"

#include <algorithm>
#include <vector>

namespace randfuse::cpu {
namespace {

constexpr uint32_t kDomain = domain_word(static_cast<uint32_t>(Op::kStructured), 5);

// Word of a block above its index, so that comparing breaks ties to the lowest index.
void draw(uint64_t key, uint32_t i, uint32_t role, std::vector<uint64_t>& words) {
  for (uint64_t c = 0; c < words.size(); c += 4) {
    const Words b = block<kWordRounds>(key, i, static_cast<uint32_t>(c / 4), 2 * role, kDomain);
    for (uint64_t l = c; l < std::min<uint64_t>(c + 4, words.size()); ++l) {
      words[l] = static_cast<uint64_t>(b.r[l - c]) << 32 | l;
    }
  }
}

bool one_more(uint64_t key, uint32_t i, uint32_t role, int64_t coin) {
  return block<kWordRounds>(key, i, 0, 2 * role + 1, kDomain).r[0] < coin;
}

}  // namespace

void kept_blocks(const KeptBlocksArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t width = a.kept + (a.coin > 0);
  std::vector<uint64_t> words(a.n);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const uint64_t key = static_cast<uint64_t>(a.keys[r / a.rows]);
    const uint32_t i = static_cast<uint32_t>(a.row_offset + r % a.rows);
    const int64_t k = a.coin > 0 && one_more(key, i, a.role, a.coin) ? width : a.kept;
    draw(key, i, a.role, words);
    std::nth_element(words.begin(), words.begin() + k, words.end());
    int64_t* out = a.out + r * width;
    std::transform(words.begin(), words.begin() + k, out,
                   [](uint64_t w) { return w & 0xFFFFFFFFu; });
    std::sort(out, out + k);
    std::fill(out + k, out + width, a.n);
  }
}

}  // namespace randfuse::cpu
