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
// what is left of a law
#include "residual.h"
// one request, place by place
#include "accept_request.h"
// and as a whole
#include "accept_block.h"

template <class T>
void speculative_accept(const cpu::AcceptArgs<T>& a, int64_t begin, int64_t end,
                        cpu::AcceptScratch<cpu::Wide<T>>& scratch) {
  for (int64_t b = begin; b < end; ++b) {
    AcceptRequest<T> request(a, b, scratch);
    if (!accept_block(request)) request.run();
  }
}

// What open_target and open_draft would find out, and in mode match the race.
template <class T>
void accept_stats(const cpu::AcceptArgs<T>& a, int64_t begin, int64_t end,
                  cpu::AcceptScratch<cpu::Wide<T>>& scratch) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t span = task % a.spans(), place = task / a.spans() % a.places();
    const AcceptRequest<T> request(a, task / a.spans() / a.places(), scratch);
    const int first = static_cast<int>(span * a.kSpan);
    const int last = static_cast<int>(a.tiles() < first + a.kSpan ? a.tiles() : first + a.kSpan);
    TileStats<cpu::Wide<T>>* out = a.stats_of(request.b, place);
    if (place > a.drafts) {
      const int64_t j = place - a.drafts - 1;
      if (j < request.drafts && request.has_draft_rows() && !std::isfinite(request.saved_draft(j)))
        request.draft(j).template tile_range<false>(first, last, out);
    } else if (place <= request.drafts && a.rows_of(request.b) > 0) {
      RowDraws<T> p = request.target(place);
      if (a.mode == cpu::AcceptMode::kTypical)
        p.template tile_range<true>(first, last, out);
      else if (!std::isfinite(request.saved_target(place)))
        p.template tile_range<false>(first, last, out);
      if (a.racers && !request.greedy()) {
        p.race(request.coins_at(place), 1, first, last);
        a.racers_of(request.b, place)[span] = scratch.target.racers[0];
      }
    }
  }
}

}  // namespace randfuse::RF_ISA
