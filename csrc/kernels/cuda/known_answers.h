// Random words computed on the device, for the known-answer tests (tests/kat/streams.txt).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace randfuse::cuda {

enum class Question : uint32_t { kPhilox, kBlock, kLane, kFoldIn, kExponential, kRace };

struct KnownAnswerArgs {
  Question question;
  uint32_t rounds;  // 7 or 10
  uint32_t c[4];    // kPhilox: the counter; kBlock, kLane: j, i, s, domain (kLane: j is ignored);
                    // kExponential: high and low word; kRace: -, i, s
  uint64_t key;     // kPhilox: k1 << 32 | k0
  uint64_t data;    // kLane: first column; kFoldIn: the integer folded in; kRace: token
  uint32_t log2_width;  // kLane
};

// answers (count, 4): words of kPhilox and kBlock; in word 0 the lane of column data + index;
// in words 0 and 1 the folded key; kRace: high and low word and, as kExponential, a float64's bits,
// low half first. Asynchronous.
cudaError_t launch_known_answers(const KnownAnswerArgs& args, int64_t count, uint32_t* answers,
                                 cudaStream_t stream);

}  // namespace randfuse::cuda
