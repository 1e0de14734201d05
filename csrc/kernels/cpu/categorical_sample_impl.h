namespace randfuse::RF_ISA {
#include "simd.h"
// each builds on those before it
#include "simd_math.h"
// (comments keep the formatter from sorting)
#include "logit_tiles.h"
#include "tile_stats.h"
// and these on the tiles
#include "filters.h"
#include "row_draws.h"

template <bool kStats, class T>
inline void sample_row(const cpu::CategoricalArgs<T>& a, int64_t out,
                       cpu::RowScratch<cpu::Wide<T>>& scratch) {
  using Z = cpu::Wide<T>;
  const int64_t row = a.rows ? a.rows[out] : out, draws = a.num_samples;
  const double temperature = a.temperature.at(row, 1.0);
  const int64_t top_k = a.top_k.at(row, a.logits.vocab);
  const double top_p = a.top_p.at(row, 1.0), min_p = a.min_p.at(row, 0.0);
  const bool greedy = temperature == 0.0;
  const bool filters =
      (!greedy || kStats) && (top_k < a.logits.vocab || top_p < 1.0 || min_p > 0.0);
  const Coins coins{static_cast<uint64_t>(a.keys[row / a.rows_per_key]),
                    static_cast<uint32_t>(a.row_offset + row % a.rows_per_key)};
  RowDraws<T> draw(a.logits, row, greedy ? 1.0 : temperature, scratch);
  int64_t* tokens = a.tokens + out * draws;
  if (kStats || filters || greedy || !a.race) draw.template measure<kStats>();
  if (filters && draw.finite()) {
    draw.cut(top_k, top_p, min_p);
    draw.template measure<kStats>();
  }
  if (greedy || (draw.measured && !draw.finite())) {
    const int64_t best = draw.first_maximum();
    for (int64_t s = 0; s < draws; ++s) {
      tokens[s] = a.logits.col_offset + best;
      if (a.score) a.score[out * draws + s] = static_cast<double>(draw.max);
    }
  } else if (a.race) {
    draw.race(coins, draws);
    for (int64_t s = 0; s < draws; ++s) {
      tokens[s] = a.logits.col_offset + scratch.racers[s].token;
      if (a.score) a.score[out * draws + s] = scratch.racers[s].score;
    }
  } else {
    for (int64_t s = 0; s < draws; ++s)
      tokens[s] = draw.by_mass(coins.block(draw_domain(), 0, static_cast<uint32_t>(s)));
  }
  if constexpr (kStats) {
    const RowFacts facts = draw.facts();
    a.margin[out] = static_cast<Z>(facts.margin);
    a.entropy[out] = static_cast<Z>(facts.entropy);
    a.logsumexp[out] = static_cast<Z>(facts.logsumexp);
    for (int64_t s = 0; s < draws; ++s) {
      const TokenFacts of = draw.facts_of(tokens[s], facts);
      a.logprob[out * draws + s] = static_cast<Z>(of.logprob);
      a.log_odds[out * draws + s] = static_cast<Z>(of.log_odds);
    }
  }
}

template <class T>
void categorical_sample(const cpu::CategoricalArgs<T>& a, int64_t begin, int64_t end,
                        cpu::RowScratch<cpu::Wide<T>>& scratch) {
  for (int64_t out = begin; out < end; ++out) {
    if (a.margin)
      sample_row<true>(a, out, scratch);
    else
      sample_row<false>(a, out, scratch);
  }
}

}  // namespace randfuse::RF_ISA
