// speculative_accept on the CPU at the ends of its coins, u = 0 and u = 1 - 2^-53, which no seed
// that one could find gives: the text of the kernel once more, with words that the test dictates.
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "../kernels/cpu/speculative_accept.h"
#include "check.h"

namespace randfuse {
inline uint32_t dictated_word = 0;

template <int kRounds>
Words dictated(uint64_t, uint32_t, uint32_t, uint32_t, uint32_t) {
  return {{dictated_word, dictated_word, dictated_word, dictated_word}};
}
}  // namespace randfuse

#define RF_BASELINE 0
#define RF_AVX2 1
#define RF_AVX512 2
#define RF_ISA dictated_isa
#define RF_LEVEL RF_BASELINE
#define block dictated
#include "../kernels/cpu/speculative_accept_impl.h"
#undef block

namespace randfuse::test {
namespace {

using cpu::AcceptMode;

constexpr int64_t kVocab = 2500;  // three tiles, the last a ragged one
constexpr uint32_t kEnds[] = {0u, ~0u};
constexpr const char* kNames[] = {"token", "block", "match", "typical"};
constexpr double kImpossible = -std::numeric_limits<double>::infinity();

template <class T>
cpu::LogitRows<T> rows_of(const std::vector<T>& logits) {
  cpu::LogitRows<T> rows{};
  rows.logits = logits.data();
  rows.layout.dims = 1;
  rows.layout.size[0] = static_cast<int64_t>(logits.size()) / kVocab;
  rows.layout.stride[0] = rows.vocab = kVocab;
  return rows;
}

// One request of K drafts.
template <class T>
struct Step {
  std::vector<T> target, draft;  // (K + 1, V), (K, V)
  std::vector<int64_t> ids;
  AcceptMode mode;
  bool with_law;

  Step(std::vector<int64_t> drafts, AcceptMode m, bool law)
      : target((drafts.size() + 1) * kVocab),
        draft(drafts.size() * kVocab),
        ids(std::move(drafts)),
        mode(m),
        with_law(law) {}

  T* p(int64_t j) { return target.data() + j * kVocab; }
  T* q(int64_t j) { return draft.data() + j * kVocab; }

  // The tokens that are emitted at a word; all but the last are drafts.
  std::vector<int64_t> run(uint32_t word) {
    using Z = cpu::Wide<T>;
    dictated_word = word;
    const int64_t k = static_cast<int64_t>(ids.size()), key = 7;
    int64_t accepted = 0, status = 0;
    std::vector<int64_t> tokens(k + 1);
    std::vector<Z> logprobs(k + 1);
    std::vector<cpu::BlockPlace<Z>> places(k + 1);
    cpu::AcceptArgs<T> args{};
    args.target = rows_of(target);
    if (with_law) args.draft = rows_of(draft);
    args.requests = args.requests_per_key = 1;
    args.drafts = k;
    args.tokens_in = ids.data();
    args.keys = &key;
    args.mode = mode;
    args.tokens = tokens.data();
    args.num_accepted = &accepted;
    args.logprobs = logprobs.data();
    args.status = &status;
    const auto scratch = std::make_unique<cpu::AcceptScratch<Z>>();
    cpu::Racer racer;
    scratch->target.racers = &racer;
    scratch->places = places.data();
    dictated_isa::speculative_accept<T>(args, 0, 1, *scratch);
    CHECK(status == 0, "status " << status);
    tokens.resize(accepted + 1);
    return tokens;
  }
};

std::string show(const std::vector<int64_t>& tokens) {
  std::string text;
  for (const int64_t token : tokens) text += std::to_string(token) + " ";
  return text;
}

template <class T>
void expect(Step<T> step, uint32_t word, const std::vector<int64_t>& expected, const char* what) {
  const std::vector<int64_t> found = step.run(word);
  CHECK(found == expected, what << ", mode " << kNames[static_cast<int>(step.mode)]
                                << (step.with_law ? "" : ", one-hot") << ", word " << word << ": "
                                << show(found) << "instead of " << show(expected));
}

// A draft of p = 0 falls at u = 0 too, and what is drawn has p > 0: the first or the last that
// does.
template <class T>
void test_impossible_drafts(AcceptMode mode, bool with_law) {
  for (const double q : {5.0, kImpossible}) {  // the drafter's favourite, and what it cannot draw
    Step<T> step({3}, mode, with_law);
    for (int64_t v = 0; v < kVocab; ++v)
      step.p(0)[v] = static_cast<T>(v == 700 || v == 1500 ? 0.0 : kImpossible);
    step.q(0)[3] = static_cast<T>(q);
    for (const uint32_t word : kEnds) {
      const std::vector<int64_t> found = step.run(word);
      if (mode == AcceptMode::kMatch)  // the noise of equal logits decides
        CHECK(found.size() == 1 && (found[0] == 700 || found[0] == 1500), show(found));
      else
        expect(step, word, {word == 0 ? 700 : 1500}, "p(x) = 0");
    }
  }
}

// u < 1, so whatever has p >= q stands, and after it comes the first or the last token of p.
template <class T>
void test_certain_drafts(AcceptMode mode, bool with_law) {
  Step<T> step({4, 2499}, mode, with_law);
  for (int64_t j = 0; j < 2; ++j)
    for (int64_t v = 0; v < kVocab; ++v) {
      const double z = std::sin(0.37 * static_cast<double>(v * (j + 1)));
      step.q(j)[v] = static_cast<T>(z);
      step.p(j)[v] = static_cast<T>(with_law || v == step.ids[j] ? z : kImpossible);
    }
  for (int64_t v = 0; v < kVocab; ++v)
    step.p(2)[v] = static_cast<T>(v == 1023 || v == 1024 ? 0.0 : kImpossible);
  for (const uint32_t word : kEnds) expect(step, word, {4, 2499, word == 0 ? 1023 : 1024}, "p = q");
}

// p is larger than q on three tokens only: the second draft falls, the ends of these three come.
template <class T>
void test_ends_of_the_residual(AcceptMode mode) {
  Step<T> step({1, 0}, mode, true);
  for (const int64_t v : {10, 1030, 2400}) step.q(1)[v] = static_cast<T>(-1.0);
  step.p(1)[0] = static_cast<T>(kImpossible);
  for (const uint32_t word : kEnds) expect(step, word, {1, word == 0 ? 10 : 2400}, "residual");
}

// p_2 = q_2 and w_1 < 1: nothing is left of w_1 p_2, so h_1 = 0 and u = 0 does not stop there
// either.
template <class T>
void test_a_stop_with_nothing_left() {
  Step<T> step({5, 0}, AcceptMode::kBlock, true);
  step.q(0)[5] = static_cast<T>(1.0);
  step.p(1)[0] = step.q(1)[0] = static_cast<T>(kImpossible);
  for (const uint32_t word : kEnds) expect(step, word, {word == 0 ? 0 : 2499}, "nothing left");
}

template <class T>
void test_all() {
  for (const bool with_law : {false, true}) {
    for (const AcceptMode mode :
         {AcceptMode::kToken, AcceptMode::kBlock, AcceptMode::kMatch, AcceptMode::kTypical})
      test_impossible_drafts<T>(mode, with_law);
    for (const AcceptMode mode : {AcceptMode::kToken, AcceptMode::kBlock})
      test_certain_drafts<T>(mode, with_law);
  }
  for (const AcceptMode mode : {AcceptMode::kToken, AcceptMode::kBlock})
    test_ends_of_the_residual<T>(mode);
  test_a_stop_with_nothing_left<T>();
}

}  // namespace
}  // namespace randfuse::test

int main() {
  randfuse::test::test_all<float>();
  randfuse::test::test_all<double>();
  return check::report("test_accept_coins");
}
