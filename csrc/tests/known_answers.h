// Reads tests/kat/streams.txt and compares it with an implementation of its questions.
#pragma once
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "../kernels/cuda/known_answers.h"
#include "check.h"

namespace randfuse::test {

using cuda::KnownAnswerArgs;
using cuda::Question;

inline uint32_t log2_of(uint32_t width) {
  uint32_t log2 = 0;
  while (1u << log2 < width) ++log2;
  return log2;
}

// answer(args, count) returns count x 4 words.
template <class Answer>
void check_known_answers(const std::string& path, const Answer& answer) {
  std::ifstream file(path);
  CHECK(file.is_open(), "cannot read " << path);
  int lines = 0;
  for (std::string line; std::getline(file, line);) {
    std::istringstream in(line);
    std::string kind;
    in >> kind;
    if (kind.empty() || kind[0] == '#') continue;
    const auto decimal = [&] {
      uint64_t v = 0;
      in >> std::dec >> v;
      return v;
    };
    const auto hex = [&] {
      uint64_t v = 0;
      in >> std::hex >> v;
      return v;
    };
    KnownAnswerArgs a{};
    std::vector<uint32_t> expected;  // words, or one per lane
    int64_t count = 1;
    int words = 4;
    if (kind == "philox") {
      a.question = Question::kPhilox;
      a.rounds = decimal();
      for (uint32_t& c : a.c) c = hex();
      a.key = hex();
      a.key |= hex() << 32;
    } else if (kind == "fold_in") {
      a.question = Question::kFoldIn;
      a.key = hex(), a.data = hex();
      const uint64_t folded = hex();
      expected = {static_cast<uint32_t>(folded), static_cast<uint32_t>(folded >> 32)};
      words = 2;
    } else if (kind == "block" || kind == "lanes") {
      a.question = kind == "block" ? Question::kBlock : Question::kLane;
      a.key = hex();
      if (kind == "block") a.c[1] = decimal(), a.c[0] = decimal(), a.c[2] = decimal();
      const uint32_t op = decimal();
      a.log2_width = log2_of(decimal());
      a.c[3] = domain_word(op, a.log2_width);
      a.rounds = decimal();
      if (kind == "lanes") a.c[1] = decimal(), a.data = decimal(), count = decimal(), words = 1;
    } else if (kind == "exponential" || kind == "race") {
      a.question = kind == "race" ? Question::kRace : Question::kExponential;
      a.rounds = kWordRounds;
      if (kind == "race") a.key = hex(), a.c[1] = decimal(), a.data = decimal(), a.c[2] = decimal();
      if (kind == "race") expected = {static_cast<uint32_t>(hex()), static_cast<uint32_t>(hex())};
      if (kind == "exponential") a.c[0] = hex(), a.c[1] = hex(), words = 2;
      const uint64_t e = hex();
      expected.insert(expected.end(), {static_cast<uint32_t>(e), static_cast<uint32_t>(e >> 32)});
    } else if (kind == "domain") {
      const uint32_t op = decimal(), width = decimal();
      CHECK(domain_word(op, log2_of(width)) == hex(), line);
      ++lines;
      continue;
    } else {
      CHECK(kind == "digest", "unknown line " << line);  // SHA-256 digests are Python's to check
      continue;
    }
    while (static_cast<int64_t>(expected.size()) < count * words) expected.push_back(hex());
    CHECK(!in.fail(), "malformed line " << line);
    const std::vector<uint32_t> got = answer(a, count);
    for (int64_t i = 0; i < count * words; ++i) {
      const uint32_t word = got[i / words * 4 + i % words];
      CHECK(word == expected[i], line << ": word " << i << " is " << std::hex << word);
    }
    ++lines;
  }
  CHECK(lines > 15, "only " << lines << " known answers in " << path);
}

}  // namespace randfuse::test
