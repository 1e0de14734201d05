// speculative_accept on the SIMT executor against the CPU kernel: the same tokens, counts and
// status, the same log-probabilities within float32.
#include "../kernels/cuda/speculative_accept.h"

#include "../kernels/cpu/speculative_accept.h"
#include "cuda_cases.h"

namespace randfuse::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Case {
  const char* what;
  int64_t requests, drafts, vocab;
  cpu::AcceptMode mode;
  bool rows = true;  // of the draft
  double temperature = 0.8;
  bool peculiar = false;            // rows that are not finite, ids that are none
  bool mixed = false;               // temperature, min_p and a mask of their own, positions, keys
  bool ragged = false;              // packed rows
  bool saved = false, map = false;  // log-sum-exps, some of them no numbers; columns of a draft
  bool cuts =
      false;  // mixed with top_k and top_p, whose histograms take the executor a second a row
};

// Inputs of both implementations, and what one of them found.
template <class T>
struct Step {
  Matrix<T> target, draft;  // K + 1 rows a request, the last of a draft in nobody's view
  std::vector<int64_t> ids, keys, positions, counts, cu, top_k, token, column, starts;
  std::vector<double> temperature, draft_temperature, top_p, min_p, target_lse, draft_lse;
  std::vector<int32_t> bitmask;
  int64_t width, words;
  double threshold = 0.02;  // of mode typical; mostly above 0.3 exp(-entropy)

  explicit Step(const Case& c)
      : target(c.requests * (c.drafts + 1), c.vocab, c.vocab + (c.ragged ? 3 : 0), 1),
        draft(target.rows, c.map ? 90 : c.vocab, c.map ? 90 : c.vocab + 1, 2),
        width(c.map ? 90 : c.vocab),
        words((c.vocab + 31) / 32) {
    std::mt19937 bits(7);
    std::uniform_real_distribution<double> unit;
    const auto to = [&](int64_t row) { return row / c.drafts * (c.drafts + 1) + row % c.drafts; };
    for (T& v : target.data) v = from_float<T>(2.0f * to_float(v));
    for (int64_t r = 0; r < c.requests * c.drafts; ++r) {
      for (int64_t v = 0; !c.map && v < c.vocab; ++v)
        draft.set(to(r), v, target.at(to(r), v) + 0.6f * draft.at(to(r), v));
      // A token that the draft finds likely: the best of a few.
      int64_t best = bits() % c.vocab;
      for (int tries = 0; tries < 40; ++tries) {
        const int64_t other = bits() % c.vocab;
        if (target.at(to(r), other) > target.at(to(r), best) + unit(bits)) best = other;
      }
      ids.push_back(best);
    }
    for (int64_t k = 0; k < (c.mixed ? 2 : 1); ++k)
      keys.push_back(static_cast<int64_t>(bits()) << 32 | bits());
    cu.push_back(0);
    for (int64_t b = 0; b < c.requests; ++b) {
      temperature.push_back(c.mixed ? 0.7 * (b % 3) : c.temperature);
      draft_temperature.push_back(b % 4 == 1 ? 0.0 : 0.5 + 0.1 * b);
      positions.push_back(static_cast<int64_t>(bits()) << 20);
      counts.push_back(bits() % (c.drafts + 1));
      cu.push_back(cu.back() + (b == 1 ? 0 : counts.back() + 1));
      top_k.push_back(c.cuts ? 1 + bits() % 60 : c.vocab);
      top_p.push_back(c.cuts ? unit(bits) : 1.0);
      min_p.push_back(0.05 * unit(bits));
    }
    for (int64_t i = 0; i < target.rows * words; ++i)
      bitmask.push_back(static_cast<int32_t>(bits() | bits()));
    for (int64_t k = 0; k < width; ++k) column.push_back(k);
    std::vector<int64_t> means;
    for (int64_t k = 0; k < width; ++k)
      means.push_back(k % 3 == 0 && !ids.empty() ? ids[k % ids.size()] : bits() % c.vocab);
    std::stable_sort(column.begin(), column.end(),
                     [&](int64_t a, int64_t b) { return means[a] < means[b]; });
    for (const int64_t k : column) token.push_back(means[k]);
    for (int64_t v = 0; v <= c.vocab; ++v)
      starts.push_back(std::lower_bound(token.begin(), token.end(), v) - token.begin());
    if (c.drafts > 32) stand_late(c);
    if (c.peculiar) spoil(c);
    if (c.saved) save(c);
  }

  // Of equal laws every draft stands, up to an id that is none.
  void stand_late(const Case& c) {
    for (int64_t r = 0; r < target.rows; ++r)
      for (int64_t v = 0; v < c.vocab; ++v) draft.set(r, v, target.at(r, v));
    for (int64_t b = 0; b < c.requests; ++b) ids[b * c.drafts + 35] = c.vocab - b;
  }

  void spoil(const Case& c) {
    const auto fill = [&](Matrix<T>& x, int64_t row, int64_t step, float v) {
      for (int64_t t = 3; row < x.rows && t < x.cols; t += step) x.set(row, t, v);
    };
    const float kinds[] = {NAN, -kInf, kInf};
    for (int64_t b = 0; b < c.requests; ++b) {
      const int64_t j = b % (c.drafts + 1), kind = b / 2 % 3;
      Matrix<T>& where = b % 2 || j == c.drafts ? target : draft;
      const int64_t row = b * (c.drafts + 1) + j;
      fill(where, row, b % 5 == 0 ? 1 : 1000, kinds[kind]);
      if (b % 5 == 0)
        for (int64_t t = 0; t < 3; ++t) where.set(row, t, kinds[kind]);
      if (kind == 2 && b % 4 < 2 && j < c.drafts) ids[b * c.drafts + j] = 3;  // what +inf forces
    }
    for (size_t i = 3; i < ids.size(); i += 7) ids[i] = i % 3 == 0 ? -1 : c.vocab + 5;
  }

  void save(const Case& c) {
    const auto lse = [&](const Matrix<T>& x, int64_t row, double t) {
      double sum = 0.0;
      for (int64_t v = 0; v < x.cols; ++v) sum += std::exp(x.at(row, v) / t);
      return row % 6 == 5 ? kInf : std::log(sum);
    };
    for (int64_t r = 0; r < target.rows; ++r) target_lse.push_back(lse(target, r, c.temperature));
    for (int64_t r = 0; r < draft.rows; ++r)
      if (r % (c.drafts + 1) != c.drafts)
        draft_lse.push_back(lse(draft, r, draft_temperature[r / (c.drafts + 1)]));
  }
};

struct Found {
  std::vector<int64_t> tokens, accepted, status;
  std::vector<float> logprobs;

  explicit Found(const Case& c)
      : tokens(c.requests * (c.drafts + 1), -7),
        accepted(c.requests, -7),
        status(c.requests, -7),
        logprobs(tokens.size(), 12345.0f) {}
};

// What both kinds of arguments call alike.
template <class Args, class T>
void common(Args& a, const Case& c, const Step<T>& s, Found& found) {
  a.requests = c.requests, a.drafts = c.drafts;
  a.cu_rows = c.ragged ? s.cu.data() : nullptr;
  a.num_drafts = c.mixed && !c.ragged ? s.counts.data() : nullptr;
  a.tokens_in = s.ids.data(), a.keys = s.keys.data();
  a.requests_per_key = c.requests / static_cast<int64_t>(s.keys.size());
  a.positions = c.mixed ? s.positions.data() : nullptr;
  a.target_lse = c.saved ? s.target_lse.data() : nullptr;
  a.draft_lse = c.saved ? s.draft_lse.data() : nullptr;
  a.typical_threshold = s.threshold, a.typical_alpha = 0.3;
  a.target.bitmask = c.mixed ? s.bitmask.data() : nullptr, a.target.bitmask_words = s.words;
  a.target.logits = s.target.data.data(), a.target.vocab = c.vocab;
  a.draft.logits = c.rows ? s.draft.data.data() : nullptr, a.draft.vocab = c.vocab;
  a.tokens = found.tokens.data(), a.num_accepted = found.accepted.data();
  a.logprobs = found.logprobs.data(), a.status = found.status.data();
}

template <class T>
Found on_cpu(const Case& c, const Step<T>& s) {
  Found found(c);
  cpu::AcceptArgs<T> a{};
  common(a, c, s, found);
  a.mode = c.mode;
  a.target.layout.dims = 1;
  a.target.layout.size[0] = s.target.rows, a.target.layout.stride[0] = s.target.stride;
  a.draft.layout.dims = 2;
  a.draft.layout.size[0] = c.requests, a.draft.layout.size[1] = c.drafts;
  a.draft.layout.stride[0] = (c.drafts + 1) * s.draft.stride;
  a.draft.layout.stride[1] = s.draft.stride;
  if (c.map) a.draft.token = s.token.data(), a.draft.column = s.column.data();
  a.draft.num_columns = s.width;
  a.temperature = {s.temperature.data(), false};
  if (c.mixed || c.saved) a.draft_temperature = {s.draft_temperature.data(), false};
  if (c.mixed) a.top_k = {s.top_k.data(), false}, a.top_p = {s.top_p.data(), false};
  if (c.mixed) a.min_p = {s.min_p.data(), false};
  if (c.mode == cpu::AcceptMode::kTypical) a.target_lse = nullptr;
  cpu::speculative_accept(a, 0, c.requests);
  return found;
}

template <class T>
Found on_executor(const Case& c, const Step<T>& s, bool early, const std::string& what) {
  Found found(c);
  cuda::AcceptArgs<T> a{};
  common(a, c, s, found);
  a.mode = static_cast<cuda::AcceptMode>(c.mode);
  a.target.stride = s.target.stride, a.target.rows = s.target.rows;
  a.draft.stride = s.draft.stride;
  a.target_step = (c.drafts + 1) * s.target.stride;
  a.draft_step = (c.drafts + 1) * s.draft.stride;
  if (c.map) a.columns = {s.starts.data(), s.column.data()};
  a.temperature = {s.temperature.data(), false, 1.0};
  a.draft_temperature = {c.mixed || c.saved ? s.draft_temperature.data() : nullptr, false, NAN};
  a.filters = c.mixed;
  a.top_k = {c.mixed ? s.top_k.data() : nullptr, false, int64_t{1} << 62};
  a.top_p = {c.mixed ? s.top_p.data() : nullptr, false, 1.0};
  a.min_p = {c.mixed ? s.min_p.data() : nullptr, false, 0.0};
  std::vector<uint32_t> words(c.requests * (c.drafts + 2));
  a.words = early ? words.data() : nullptr;
  a.warps = early ? 2 : 3;  // of 16: fibers are slow
  std::vector<float> memory(cuda::accept_workspace(a) / sizeof(float) + 2,
                            99.0f);  // of no use as it is
  CHECK(cuda::launch_speculative_accept(a, memory.data(), nullptr) == cudaSuccess, what);
  return found;
}

template <class T>
void compare(const Case& c, const Step<T>& s, const std::string& what) {
  const Found expected = on_cpu(c, s);
  const bool can_stop = c.mode != cpu::AcceptMode::kBlock && !c.mixed;
  const auto got = check::reproducible(what, [&] {
    const Found f = on_executor(c, s, can_stop && simt::seed != 2, what);
    std::vector<double> all(f.tokens.begin(), f.tokens.end());
    for (const auto* part : {&f.accepted, &f.status})
      all.insert(all.end(), part->begin(), part->end());
    all.insert(all.end(), f.logprobs.begin(), f.logprobs.end());
    return all;
  });
  const int64_t places = c.drafts + 1, tokens = c.requests * places;
  for (int64_t b = 0; b < c.requests; ++b) {
    const double accepted = got[tokens + b], status = got[tokens + c.requests + b];
    CHECK(accepted == static_cast<double>(expected.accepted[b]),
          what << ": request " << b << " accepts " << accepted << ", " << expected.accepted[b]);
    CHECK(status == static_cast<double>(expected.status[b]), what << ": status of request " << b
                                                                  << " is " << status << ", not "
                                                                  << expected.status[b]);
    for (int64_t i = b * places; i < (b + 1) * places; ++i) {
      CHECK(got[i] == static_cast<double>(expected.tokens[i]),
            what << ": token " << i - b * places << " of request " << b << " is " << got[i]
                 << ", on the CPU " << expected.tokens[i]);
      const double f = got[tokens + 2 * c.requests + i], e = expected.logprobs[i];
      const bool same = f == e || (std::isnan(f) && std::isnan(e)) ||
                        std::abs(f - e) <= 3e-6 + 1e-5 * std::abs(e);
      CHECK(same, what << ": logprob " << i << " is " << f << ", on the CPU " << e);
    }
  }
}

template <class T>
void run(const char* dtype, const Case& c) {
  std::ostringstream text;
  text << dtype << " " << c.what << " (" << c.requests << "," << c.drafts << "," << c.vocab
       << ") mode " << static_cast<int>(c.mode);
  compare(c, Step<T>(c), text.str());
}

// Decisions 1e-9 from their coin, which float32 sums cannot see. K = 1, two tiles, the second of
// one token. `tile`: the draft falls and a tile of what is left ends at the coin; else the draft
// itself, p(x) = u q(x).
void run_edge(cpu::AcceptMode mode, bool rows, bool tile) {
  Case c{"edge", 4, 1, kTile + 1, mode, rows, 1.0};
  Step<float> s(c);
  s.threshold = 2e-4;
  const uint64_t key = static_cast<uint64_t>(s.keys[0]);
  for (int64_t b = 0; b < c.requests; ++b) {
    const auto words = [&](uint32_t domain) {
      const Words w = block<kWordRounds>(key, static_cast<uint32_t>(b), 0, 0, domain);
      return coin53(w.r[0], w.r[1]);
    };
    // One token decides, the last or the draft; x near -30 never stands.
    const int64_t x = tile ? 5 : kTile, row = 2 * b;
    s.ids[b] = x;
    double share =
        mode == cpu::AcceptMode::kTypical && !tile ? s.threshold : words(accept_domain());
    if (tile) share = 1.0 - words(residual_domain());
    for (int64_t v = 0; v < c.vocab; ++v) s.draft.set(row, v, v == x ? 0.0f : -kInf);
    if (tile) s.target.set(row, x, -60.0f);
    const auto others = [&] {
      double sum = 0.0;
      for (int64_t v = 0; v < kTile; ++v)
        sum += v == x ? 0.0 : std::exp(double{s.target.at(row, v)});
      return sum;
    };
    const double odds = share / (1.0 - share), shift = std::log(others() * odds);
    for (int64_t v = 0; v < kTile; ++v)
      if (v != x) s.target.set(row, v, static_cast<float>(s.target.at(row, v) - shift));
    const double fine = std::log(others() * odds);  // near 0, where float32 is fine
    s.target.set(row, kTile, static_cast<float>(fine + (b % 2 ? 1e-9 : -1e-9)));
  }
  std::ostringstream what;
  what << "edge of mode " << static_cast<int>(mode) << (rows ? " with" : " without") << " rows"
       << (tile ? ", tile" : ", draft");
  compare(c, s, what.str());
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  using randfuse::bfloat16_t, randfuse::half_t;
  using Mode = randfuse::cpu::AcceptMode;
  for (const Mode mode : {Mode::kToken, Mode::kBlock, Mode::kMatch, Mode::kTypical}) {
    run<bfloat16_t>("bfloat16", {"plain", 4, 3, 1100, mode});
    run<float>("float", {"mixed", 6, 2, 1100, mode, true, 1.0, false, true});
    run<half_t>("half", {"peculiar", 26, 2, 150, mode, true, 1.0, true});
    run<float>("float", {"saved", 5, 2, 1100, mode, true, 0.8, false, false, false, true});
  }
  run<half_t>("half", {"one-hot", 6, 2, 1100, Mode::kToken, false});
  run<float>("float", {"one-hot, peculiar", 10, 2, 100, Mode::kBlock, false, 1.0, true});
  run<half_t>("half", {"filtered, peculiar", 14, 0, 150, Mode::kToken, true, 1.0, true, true});
  run<float>("float", {"many drafts", 2, 40, 70, Mode::kToken, true, 1.0});
  run<bfloat16_t>("bfloat16", {"ragged", 5, 3, 2060, Mode::kToken, true, 0.9, false, false, true});
  run<bfloat16_t>("bfloat16", {"ragged", 4, 3, 1, Mode::kBlock, true, 0.9, false, false, true});
  for (const Mode mode : {Mode::kToken, Mode::kBlock}) {
    Case c{"map", 3, 2, 1100, mode};
    c.map = true;
    run<float>("float", c);
  }
  Case cuts{"cuts", 4, 1, 1100, Mode::kToken, true, 1.0, false, true};
  cuts.cuts = true;
  run<float>("float", cuts);
  for (const bool tile : {false, true}) {
    for (const Mode mode : {Mode::kToken, Mode::kBlock, Mode::kTypical}) run_edge(mode, true, tile);
    run_edge(Mode::kToken, false, tile);
  }
  return check::report("test_cuda_speculative_accept");
}
