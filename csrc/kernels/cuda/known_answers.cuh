// One thread per answer. Not a fast kernel: it shows that the device compiles the streams to the
// words of the specification.
#pragma once
#include "../common/categorical.h"
#include "device.cuh"
#include "known_answers.h"

namespace randfuse::cuda {

template <int kRounds>
RF_DEVICE Words known_answer(const KnownAnswerArgs& a, int64_t index) {
  const uint32_t k0 = static_cast<uint32_t>(a.key), k1 = static_cast<uint32_t>(a.key >> 32);
  switch (a.question) {
    case Question::kPhilox:
      return philox4x32<kRounds>(a.c[0], a.c[1], a.c[2], a.c[3], k0, k1);
    case Question::kBlock:
      return block<kRounds>(a.key, a.c[1], a.c[0], a.c[2], a.c[3]);
    case Question::kLane: {
      const uint64_t column = a.data + static_cast<uint64_t>(index);
      const uint32_t j = static_cast<uint32_t>(column >> (7 - a.log2_width));
      const Words b = block<kRounds>(a.key, a.c[1], j, a.c[2], a.c[3]);
      return {{lane(b, column, a.log2_width), 0, 0, 0}};
    }
    case Question::kExponential:
    case Question::kRace: {
      const uint32_t j = static_cast<uint32_t>(a.data / 4);
      const bool race = a.question == Question::kRace;
      const auto word = [&](uint32_t domain) {
        const Words b = block<kRounds>(a.key, a.c[1], j, a.c[2], domain);
        uint32_t found = b.r[0];  // by selection: an index known at run time would put b in memory
        for (uint32_t t = 1; t < 4; ++t) found = a.data % 4 == t ? b.r[t] : found;
        return found;
      };
      const uint32_t high = race ? word(race_high_domain()) : a.c[0];
      const uint32_t low = race ? word(race_low_domain()) : a.c[1];
      const int64_t bits = to_bits(race_exponential(high, low));
      const uint32_t half[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
      if (race) return {{high, low, half[0], half[1]}};
      return {{half[0], half[1], 0, 0}};
    }
    default: {
      const uint64_t folded = fold_in(a.key, a.data);
      return {{static_cast<uint32_t>(folded), static_cast<uint32_t>(folded >> 32), 0, 0}};
    }
  }
}

__global__ void known_answers_kernel(const KnownAnswerArgs a, int64_t count, uint32_t* answers) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const Words w =
      a.rounds == kMaskRounds ? known_answer<kMaskRounds>(a, i) : known_answer<kWordRounds>(a, i);
  for (int r = 0; r < 4; ++r) answers[4 * i + r] = w.r[r];
}

}  // namespace randfuse::cuda
