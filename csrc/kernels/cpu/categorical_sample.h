// Tokens drawn from softmax(z / T), z raw logits with what LogitRows and the filters do to them.
//
// cdf    bytes: one read of the logits, and 4 KiB a draw again from the cache. Arithmetic: 15
//        instructions for 16 tokens (tile_stats.h), 2 us a draw for the tile and the token in it.
// race   argmax of z / T - log E. One read; a Philox block for 4 tokens dominates (20 instructions
//        for 16 blocks' words a round, ~1 ns a token). From 24 bits of the word follows an upper
//        bound of the score with two fma; only tokens whose bound reaches the best score so far
//        (~ln V of them) are scored, in float64 with all 64 bits. So the winner is that of float64.
//        Scores of shards of the vocabulary merge: the greatest wins, the first of equal ones.
// Filters cost two or three more passes (filters.h).
//
// A row's result depends on its logits, key, row number and nothing else: not on other rows, their
// order, threads or the instruction set.
#pragma once
#include "logits.h"

namespace randfuse::cpu {

template <class T>
struct CategoricalArgs {
  LogitRows<T> logits;
  const int64_t* rows;  // which rows of the logits; null: all, in order
  const int64_t* keys;  // (G,)
  int64_t rows_per_key, row_offset;
  PerRow<double> temperature;
  PerRow<int64_t> top_k;
  PerRow<double> top_p, min_p;
  int64_t num_samples;
  bool race;
  int64_t* tokens;  // (R, num_samples), ids of the whole vocabulary
  double* score;    // (R, num_samples) of a race, or null
  // Statistics of the law that is drawn from; all null or none.
  Wide<T>*logprob, *log_odds;            // (R, num_samples)
  Wide<T>*margin, *entropy, *logsumexp;  // (R,)
};

// Output rows [begin, end).
template <class T>  // float, double, half_t, bfloat16_t
void categorical_sample(const CategoricalArgs<T>& args, int64_t begin, int64_t end);

}  // namespace randfuse::cpu
