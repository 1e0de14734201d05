// categorical_sample on the SIMT executor against the CPU kernel: the same tokens and scores to the
// bit, the same facts within float32.
#include "../kernels/cuda/categorical_sample.h"

#include "../kernels/cpu/categorical_sample.h"
#include "cuda_cases.h"

namespace randfuse::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Case {
  const char* what;
  int64_t rows, vocab, pad, draws;
  bool race, facts;
  double temperature;                // NaN: one a row, some of them 0
  int64_t top_k = int64_t{1} << 62;  // of all rows; see also `mixed`
  double top_p = 1.0, min_p = 0.0;
  bool mixed = false;  // guidance, exclude, bitmask, chosen rows, two keys, top_k a row
  int64_t col_offset = 0;
};

// Ordinary rows and every kind of row that is not.
template <class T>
Matrix<T> peculiar(const Case& c) {
  Matrix<T> x(c.rows, c.vocab, c.vocab + c.pad, 1);
  const auto fill = [&](int64_t row, int64_t begin, int64_t end, float v) {
    for (int64_t t = begin; row < c.rows && t < std::min(end, c.vocab); ++t) x.set(row, t, v);
  };
  for (T& v : x.data) v = from_float<T>(3.0f * to_float(v));
  fill(1, 0, c.vocab, NAN);
  fill(2, 0, c.vocab, -kInf);
  fill(3, 3, 4, kInf), fill(3, 7, 8, kInf);
  fill(4, 5, 8, NAN);
  fill(5, 0, c.vocab, 0.25f);
  fill(6, 0, 1024, -kInf);
  fill(7, 0, c.vocab, -kInf), fill(7, 77, 78, 1.0f);
  for (int64_t t = 0; c.rows > 8 && t < c.vocab; ++t) x.set(8, t, std::round(x.at(8, t)));
  fill(9, 0, 1, NAN), fill(9, 1, 2, kInf);
  return x;
}

struct Results {  // of both implementations, poisoned
  std::vector<int64_t> tokens;
  std::vector<double> score;
  std::vector<float> facts;  // logprob, log_odds (n draws); margin, entropy, logsumexp (n)

  Results(int64_t n, int64_t draws)
      : tokens(n * draws, -7), score(n * draws, NAN), facts(n * (2 * draws + 3), 12345.0f) {}
  float* fact(int which, int64_t n, int64_t draws) {
    return facts.data() + n * (which < 2 ? which * draws : 2 * draws + which - 2);
  }
};

template <class T>
void run(const char* dtype, const Case& c) {
  std::ostringstream text;
  text << dtype << " " << c.what << " (" << c.rows << "," << c.vocab << ") pad=" << c.pad
       << " draws=" << c.draws << (c.race ? " race" : " cdf") << (c.facts ? " facts" : "");
  const std::string what = text.str();
  const Matrix<T> x = peculiar<T>(c), u(c.rows, c.vocab, c.vocab + 3, 2);
  std::vector<int64_t> keys(c.mixed ? 2 : 1), exclude, chosen, top_k;
  std::vector<double> temperature(c.rows);
  std::mt19937 bits(5);
  for (int64_t& k : keys) k = static_cast<int64_t>(bits()) << 32 | bits();
  for (int64_t r = 0; r < c.rows; ++r) {
    temperature[r] = r % 3 == 2 ? 0.0 : 0.4 + 0.2 * static_cast<double>(r);
    top_k.push_back(1 + r * 7);
    if (c.mixed) chosen.insert(chosen.end(), {c.rows - 1 - r, r / 2});
  }
  const int64_t words = (c.vocab + 31) / 32, n = c.mixed ? 2 * c.rows : c.rows;
  std::vector<int32_t> bitmask(c.rows * words);
  for (int32_t& w : bitmask) w = static_cast<int32_t>(bits() | bits());
  for (int64_t e = 0; e < 40; ++e) exclude.push_back(c.col_offset + e * 29 % c.vocab);
  std::sort(exclude.begin(), exclude.end());
  const bool own = std::isnan(c.temperature);
  const bool scores = c.race && !c.facts;

  Results expected(n, c.draws);
  cpu::CategoricalArgs<T> a{};
  a.logits.logits = x.data.data(), a.logits.vocab = c.vocab, a.logits.col_offset = c.col_offset;
  a.logits.layout.dims = 1;
  a.logits.layout.size[0] = c.rows, a.logits.layout.stride[0] = x.stride;
  a.logits.uncond_layout = a.logits.layout, a.logits.uncond_layout.stride[0] = u.stride;
  a.logits.scale_plus_one = 1.7f, a.logits.bitmask_words = words;
  a.keys = keys.data(), a.rows_per_key = c.rows / static_cast<int64_t>(keys.size());
  a.row_offset = 5, a.num_samples = c.draws, a.race = c.race;
  a.temperature = {own ? temperature.data() : &c.temperature, !own};
  a.top_k = {c.mixed ? top_k.data() : &c.top_k, !c.mixed};
  a.top_p = {&c.top_p, true}, a.min_p = {&c.min_p, true};
  if (c.mixed) {
    a.rows = chosen.data(), a.logits.uncond = u.data.data();
    a.logits.exclude = exclude.data(), a.logits.num_exclude = exclude.size();
    a.logits.bitmask = bitmask.data();
  }
  a.tokens = expected.tokens.data(), a.score = scores ? expected.score.data() : nullptr;
  if (c.facts) {
    a.logprob = expected.fact(0, n, c.draws), a.log_odds = expected.fact(1, n, c.draws);
    a.margin = expected.fact(2, n, c.draws), a.entropy = expected.fact(3, n, c.draws);
    a.logsumexp = expected.fact(4, n, c.draws);
  }
  cpu::categorical_sample(a, 0, n);

  const auto got = check::reproducible(what, [&] {
    Results r(n, c.draws);
    cuda::CategoricalArgs<T> g{};
    g.logits = {a.logits.logits,      x.stride,         c.rows, c.vocab,
                a.logits.uncond,      u.stride,         1.7f,   a.logits.exclude,
                a.logits.num_exclude, a.logits.bitmask, words,  c.col_offset};
    g.chosen = a.rows, g.count = n, g.keys = a.keys, g.rows_per_key = a.rows_per_key;
    g.row_offset = a.row_offset, g.num_samples = c.draws, g.race = c.race;
    g.temperature = {own ? temperature.data() : nullptr, false, c.temperature};
    g.top_k = {c.mixed ? top_k.data() : nullptr, false, c.top_k};
    g.top_p = {nullptr, true, c.top_p}, g.min_p = {nullptr, true, c.min_p};
    g.filters = c.mixed || c.top_k < c.vocab || c.top_p < 1.0 || c.min_p > 0.0;
    g.tokens = r.tokens.data(), g.score = scores ? r.score.data() : nullptr;
    if (c.facts) {
      g.logprob = r.fact(0, n, c.draws), g.log_odds = r.fact(1, n, c.draws);
      g.margin = r.fact(2, n, c.draws), g.entropy = r.fact(3, n, c.draws);
      g.logsumexp = r.fact(4, n, c.draws);
    }
    std::vector<cuda::Racer> memory(cuda::categorical_workspace(g) / sizeof(cuda::Racer) + 1,
                                    {NAN, -9});
    CHECK(cuda::launch_categorical_sample(g, memory.data(), nullptr) == cudaSuccess, what);
    std::vector<double> all(r.tokens.begin(), r.tokens.end());
    all.insert(all.end(), r.score.begin(), r.score.end());
    all.insert(all.end(), r.facts.begin(), r.facts.end());
    return all;
  });
  const int64_t drawn = n * c.draws;
  for (int64_t i = 0; i < drawn; ++i) {
    CHECK(got[i] == static_cast<double>(expected.tokens[i]),
          what << ": token " << i << " is " << got[i] << ", on the CPU " << expected.tokens[i]);
    CHECK(!scores || got[drawn + i] == expected.score[i],
          what << ": score " << i << " is " << got[drawn + i] << ", not " << expected.score[i]);
  }
  for (size_t i = 0; c.facts && i < expected.facts.size(); ++i) {
    const double f = got[2 * drawn + i], e = expected.facts[i];
    const bool same =
        f == e || (std::isnan(f) && std::isnan(e)) || std::abs(f - e) <= 3e-6 + 1e-5 * std::abs(e);
    CHECK(same, what << ": fact " << i << " is " << f << ", on the CPU " << e);
  }
}

// Rows whose first tile ends 1e-9 from where their coin falls, which float32 sums cannot see: the
// whole block takes them in float64.
void run_edges() {
  constexpr int64_t kRows = 24, kVocab = kTile + 1;
  Matrix<float> x(kRows, kVocab, kVocab, 1);
  const int64_t key = 77;
  const auto mass = [&](int64_t r) {
    double sum = 0.0;
    for (int64_t t = 0; t < kTile; ++t) sum += std::exp(double{x.at(r, t)});
    return sum;
  };
  for (int64_t r = 0; r < kRows; ++r) {
    const Words w = block<kWordRounds>(key, static_cast<uint32_t>(r), 0, 0, draw_domain());
    const double u = coin53(w.r[0], w.r[1]), odds = (1.0 - u) / u;
    const double shift = std::log(mass(r) * odds);  // so that the last logit is near 0, and fine
    for (int64_t t = 0; t < kTile; ++t) x.set(r, t, static_cast<float>(x.at(r, t) - shift));
    x.set(r, kTile, static_cast<float>(std::log(mass(r) * odds) + (r % 2 ? 1e-9 : -1e-9)));
  }
  const double one = 1.0;
  std::vector<int64_t> expected(kRows);
  cpu::CategoricalArgs<float> a{};
  a.logits.logits = x.data.data(), a.logits.vocab = kVocab, a.logits.layout.dims = 1;
  a.logits.layout.size[0] = kRows, a.logits.layout.stride[0] = kVocab;
  a.keys = &key, a.rows_per_key = kRows, a.num_samples = 1;
  a.temperature = {&one, true}, a.tokens = expected.data();
  cpu::categorical_sample(a, 0, kRows);
  const auto got = check::reproducible("edges", [&] {
    std::vector<int64_t> tokens(kRows, -7);
    cuda::CategoricalArgs<float> g{};
    g.logits.logits = a.logits.logits, g.logits.stride = kVocab, g.logits.rows = kRows;
    g.logits.vocab = kVocab, g.count = kRows, g.keys = &key, g.rows_per_key = kRows;
    g.num_samples = 1, g.temperature = {nullptr, true, 1.0}, g.tokens = tokens.data();
    std::vector<cuda::Racer> memory(cuda::categorical_workspace(g) / sizeof(cuda::Racer));
    CHECK(cuda::launch_categorical_sample(g, memory.data(), nullptr) == cudaSuccess, "edges");
    return tokens;
  });
  for (int64_t r = 0; r < kRows; ++r)
    CHECK(got[r] == expected[r], "edge of row " << r << ": " << got[r] << " not " << expected[r]);
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  using randfuse::bfloat16_t, randfuse::half_t;
  constexpr double kOwn = NAN;
  constexpr int64_t kAll = int64_t{1} << 62;
  run<bfloat16_t>("bfloat16", {"aligned", 10, 2048, 0, 2, false, true, 0.8});
  run<half_t>("half", {"misaligned", 10, 1501, 0, 1, true, false, kOwn});
  run<float>("float", {"misaligned", 10, 1030, 1, 1, false, false, kOwn});
  run<bfloat16_t>("bfloat16", {"one token", 4, 1, 0, 2, true, true, 1.0});
  run<bfloat16_t>("bfloat16", {"top_k", 9, 1100, 4, 1, true, false, 1.0, 50});
  // Row 4 has 1097 numbers: the 1098th token in the order of the filters is a NaN, which cuts
  // nothing.
  run<float>("float", {"top_k among NaN", 5, 1100, 0, 1, false, true, 1.0, 1098});
  // The 1060th token is a tie of the second tile in row 5 and -inf in rows 6 and 7.
  run<float>("float", {"top_k, top_p", 10, 1100, 0, 1, false, true, 0.7, 1060, 0.9});
  run<half_t>("half", {"min_p", 5, 1100, 0, 2, true, false, 1.0, kAll, 1.0, 0.05});
  run<float>("float", {"top_p 0, min_p 1", 9, 300, 0, 2, false, false, 1.0, kAll, 0.0, 1.0});
  for (const bool race : {false, true})
    run<bfloat16_t>("bfloat16", {"mixed", 6, 1222, 2, 1, race, true, kOwn, 0, 0.9, 0.01, true});
  run<float>("float", {"shard", 10, 1300, 0, 2, true, false, kOwn, kAll, 1.0, 0.0, false,
                       (int64_t{1} << 34) - 2048});
  run_edges();
  return check::report("test_cuda_categorical_sample");
}
