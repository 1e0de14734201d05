// Verification of drafted tokens: which of them stand, and the token after the last that does.
//
// Bytes a request, s an element, V the vocabulary, stop the place of the last token:
//   token    s V (stop + 1) of the target and as much of the draft: rows after the stop are not
//            read. The stop row pair is read again, from the cache.
//   block    all rows but the last; rows again from the top until one stands
//   match    s V (stop + 1) of the target, one-hot drafts in any mode the same
//   a log-sum-exp that was saved spares its row; with both, one row pair is all that is read
// Arithmetic: that of categorical_sample a row (tile_stats.h), two exponentials a token in the stop
// row (residual.h); match draws a Philox block for 4 tokens.
//
// Accepted is what passes u q < p in float64, strictly: a token of p = 0 never does. Sums are
// float32 with a known bound of their error; within it of the coin they are taken in float64. So
// the result does not depend on threads, instruction set or batch mates.
#pragma once
#include "logits.h"

namespace randfuse::cpu {

enum class AcceptMode { kToken, kBlock, kMatch, kTypical };

enum AcceptStatus : int64_t { kNaN = 1, kPosInf = 2, kNoSupport = 4, kBadId = 8 };

// What mode block keeps of a place: the laws of target and draft, and w (accept_block.h).
template <class Z>
struct BlockPlace {
  RowLaw<Z> target, draft;
  double w;
};

// What a thread works in: two rows and the tiles of their residual, under 200 KiB.
template <class Z>
struct AcceptScratch {
  RowScratch<Z> target, draft;
  double residual[kMaxTiles];
  BlockPlace<Z>* places;  // (K + 1,)
};

template <class T>
struct AcceptArgs {
  LogitRows<T> target;        // request b has rows first_row(b), first_row(b) + 1 ...
  LogitRows<T> draft;         // (B * K) rows; logits null: one-hot
  int64_t requests, drafts;   // B, K
  const int64_t* cu_rows;     // (B + 1,); null: K + 1 rows each
  const int64_t* num_drafts;  // (B,); null: as many as there are
  const int64_t* tokens_in;   // (B, K)
  const int64_t* keys;        // (G,)
  int64_t requests_per_key;
  const int64_t* positions;  // (B,) or null
  PerRow<double> temperature, draft_temperature;
  PerRow<int64_t> top_k;
  PerRow<double> top_p, min_p;
  const double *target_lse, *draft_lse;  // a value a row; null or not finite: not known
  AcceptMode mode;
  double typical_threshold, typical_alpha;
  // What threads found in tiles when requests are fewer than threads; else null. A request has
  // places() rows: K + 1 of the target, K of the draft.
  TileStats<Wide<T>>* stats;  // (B, places, tiles)
  Racer* racers;              // (B, places, spans), in mode match without filters
  int64_t* tokens;            // (B, K + 1)
  int64_t* num_accepted;
  Wide<T>* logprobs;  // (B, K + 1)
  int64_t* status;

  int64_t rows_before(int64_t b) const { return cu_rows ? cu_rows[b] : b * (drafts + 1); }
  int64_t rows_of(int64_t b) const { return cu_rows ? cu_rows[b + 1] - cu_rows[b] : drafts + 1; }
  int64_t tiles() const { return (target.vocab + kTile - 1) / kTile; }
  int64_t spans() const { return (tiles() + kSpan - 1) / kSpan; }
  int64_t places() const { return 2 * drafts + 1; }
  TileStats<Wide<T>>* stats_of(int64_t b, int64_t place) const {
    return stats + (b * places() + place) * tiles();
  }
  Racer* racers_of(int64_t b, int64_t place) const {
    return racers + (b * places() + place) * spans();
  }

  static constexpr int64_t kSpan = 16;  // tiles that one task of accept_stats takes
};

// Requests [begin, end).
template <class T>  // float, double, half_t, bfloat16_t
void speculative_accept(const AcceptArgs<T>& args, int64_t begin, int64_t end);

// Statistics of kSpan tiles each, tasks [begin, end) of B places() spans().
template <class T>
void accept_stats(const AcceptArgs<T>& args, int64_t begin, int64_t end);

}  // namespace randfuse::cpu
