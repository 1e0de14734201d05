// The random streams against tests/kat/streams.txt: the common headers as the host compiles them,
// and through the device kernel on the SIMT executor.
#include "../kernels/common/streams.h"

#include <cmath>

#include "../kernels/common/categorical.h"

#include "known_answers.h"

namespace randfuse::test {
namespace {

Words exponential_words(uint32_t high, uint32_t low) {
  const int64_t bits = to_bits(race_exponential(high, low));
  return {{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), 0, 0}};
}

template <int kRounds>
Words on_host(const KnownAnswerArgs& a, uint64_t column) {
  switch (a.question) {
    case Question::kPhilox:
      return philox4x32<kRounds>(a.c[0], a.c[1], a.c[2], a.c[3], static_cast<uint32_t>(a.key),
                                 static_cast<uint32_t>(a.key >> 32));
    case Question::kBlock:
      return block<kRounds>(a.key, a.c[1], a.c[0], a.c[2], a.c[3]);
    case Question::kLane: {
      const uint64_t per_block = 128u >> a.log2_width;
      const Words b =
          block<kRounds>(a.key, a.c[1], static_cast<uint32_t>(column / per_block), a.c[2], a.c[3]);
      const uint32_t value = lane(b, column, a.log2_width);
      if (a.log2_width == 4) {
        const uint32_t pair = keep_pair(b.r[column % 8 / 2], value);  // a lane is not below itself
        CHECK(lane16(b, static_cast<uint32_t>(column)) == value, "lane16 of column " << column);
        CHECK((pair >> column % 2 * 16 & 0xFFFFu) == 0xFFFFu, "keep_pair of column " << column);
      }
      return {{value, 0, 0, 0}};
    }
    case Question::kExponential:
      return exponential_words(a.c[0], a.c[1]);
    case Question::kRace: {
      const uint32_t j = static_cast<uint32_t>(a.data / 4), c = a.data % 4;
      const uint32_t high = block<kRounds>(a.key, a.c[1], j, a.c[2], race_high_domain()).r[c];
      const uint32_t low = block<kRounds>(a.key, a.c[1], j, a.c[2], race_low_domain()).r[c];
      const Words e = exponential_words(high, low);
      return {{high, low, e.r[0], e.r[1]}};
    }
    default: {
      const uint64_t folded = fold_in(a.key, a.data);
      return {{static_cast<uint32_t>(folded), static_cast<uint32_t>(folded >> 32), 0, 0}};
    }
  }
}

void test_rates() {
  const double nan = std::nan("");
  for (const auto& [p, threshold] : {std::pair{0.0, 0u},
                                     {1.0, 65536u},
                                     {-1.0, 0u},
                                     {2.0, 65536u},
                                     {nan, 0u},
                                     {0.5, 32768u},
                                     {0.1, 6554u},
                                     {0.5 / 65536, 0u},
                                     {1.5 / 65536, 2u}}) {
    const Rate rate = drop_rate(p);
    const double scale = threshold == 65536 ? 0.0 : 65536.0 / (65536.0 - threshold);
    CHECK(rate.threshold == threshold && rate.scale == scale,
          "p=" << p << " gives " << rate.threshold);
  }
  CHECK(keep_pair(0xFFFF0000u, 65536) == 0 && keep_pair(0, 0) == ~0u,
        "keep_pair at p = 1 and p = 0");
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse;
  using namespace randfuse::test;
  test_rates();
  check_known_answers(RANDFUSE_KAT_FILE, [](const KnownAnswerArgs& a, int64_t count) {
    std::vector<uint32_t> words;
    for (int64_t i = 0; i < count; ++i) {
      const Words w = a.rounds == 7 ? on_host<7>(a, a.data + i) : on_host<10>(a, a.data + i);
      words.insert(words.end(), w.r, w.r + 4);
    }
    return words;
  });
  check_known_answers(RANDFUSE_KAT_FILE, [](const KnownAnswerArgs& a, int64_t count) {
    return check::reproducible("known answers", [&] {
      std::vector<uint32_t> words(4 * count);
      CHECK(cuda::launch_known_answers(a, count, words.data(), nullptr) == cudaSuccess,
            "known answers");
      return words;
    });
  });
  return check::report("test_streams");
}
