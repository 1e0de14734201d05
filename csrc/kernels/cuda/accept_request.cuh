// One request as a warp sees it: its rows, its coins, and the verdict on each place.
#pragma once
#include "accept_row.cuh"
#include "filters.cuh"
#include "tile_race.cuh"

namespace randfuse::cuda {

// What mode block keeps of a place: w (accept_block.cuh) and the totals of its laws.
struct BlockPlace {
  double w, target_total, draft_total;
};

template <class T>
struct AcceptWorkspace {
  TileStats<float>*target, *draft;  // (B, K + 1, tiles), (B, K, tiles)
  Racer* racers;                    // (B, K + 1, tiles), mode match
  Cut<float>* cuts;                 // (B, K + 1), with filters
  BlockPlace* places;               // (B, K + 1), mode block
  size_t bytes;

  RF_HD AcceptWorkspace(const AcceptArgs<T>& a, void* memory) {
    const size_t places_in = a.requests * (a.drafts + 1), tiles = a.target.tiles();
    const bool drafts = a.draft.logits && a.ratio();
    uintptr_t next = reinterpret_cast<uintptr_t>(memory);
    const auto take = [&](auto** array, size_t count) {
      *array = reinterpret_cast<std::remove_reference_t<decltype(*array)>>(next);
      next += count * sizeof **array;
    };
    take(&target, places_in * tiles);
    take(&draft, drafts ? a.requests * a.drafts * tiles : 0);
    take(&racers, a.mode == AcceptMode::kMatch ? places_in * tiles : 0);
    take(&cuts, a.filters ? places_in : 0);
    take(&places, a.mode == AcceptMode::kBlock && drafts ? places_in : 0);
    bytes = next - reinterpret_cast<uintptr_t>(memory);
  }
};

enum class Next { kOpen, kAccept, kToken, kFromTarget, kResidual, kBeside };

struct Verdict {
  Next next;
  float logprob;   // of the draft, if it stands
  int64_t status;  // of the rows that were looked at
  int64_t token;   // kToken: the one to emit; kBeside: the one to leave out
};

// What can be said of a request before a row is read.
struct AcceptFacts : RaceRow {
  int64_t b;
  double draft_temperature;  // 0: drafts are one-hot
  int64_t first_row, rows;   // of the target
  int64_t drafts;            // that can be verified: up to the first id that is none
  int64_t after_last;        // status if all of them stand

  template <class T>
  RF_DEVICE AcceptFacts(const AcceptArgs<T>& a, int64_t request) : b(request) {
    const double given_t = a.temperature.at(b), draft_t = a.draft_temperature.at(b);
    greedy = !(given_t > 0.0);
    temperature = greedy ? 1.0 : warm(given_t);
    draft_temperature = draft_t != draft_t ? temperature : draft_t > 0.0 ? warm(draft_t) : 0.0;
    // Of 32 bits: a longer division is a call.
    const int64_t group = static_cast<uint32_t>(b) / static_cast<uint32_t>(a.requests_per_key);
    key = static_cast<uint64_t>(load_constant(a.keys + group));
    stream_row = static_cast<uint32_t>(b - group * a.requests_per_key);
    first_row = b * (a.drafts + 1);
    rows = a.drafts + 1;
    if (a.cu_rows) {
      first_row = clamp(load_constant(a.cu_rows + b), 0, a.target.rows);
      rows = clamp(load_constant(a.cu_rows + b + 1) - first_row, 0,
                   min(a.drafts + 1, a.target.rows - first_row));
    }
    const int64_t most = max(rows - 1, int64_t{0});
    const int64_t given = a.num_drafts ? clamp(load_constant(a.num_drafts + b), 0, most) : most;
    const int64_t* ids = a.tokens_in + b * a.drafts;
    drafts = given;
#pragma unroll 1
    for (int64_t j = 0; j < given && drafts == given; j += 32) {
      const int64_t mine = j + threadIdx.x % 32, x = mine < given ? load_constant(ids + mine) : 0;
      const uint32_t none = __ballot_sync(kAll, x < 0 || x >= a.target.vocab);
      if (none != 0) drafts = j + lowest_bit(none);
    }
    after_last = drafts < given && load_constant(ids + drafts) != -1 ? kBadId : 0;
  }

 private:
  RF_DEVICE static double warm(double t) { return fmin(fmax(t, 0x1p-100), 0x1p100); }
  RF_DEVICE static int64_t clamp(int64_t v, int64_t low, int64_t high) {
    return v < low ? low : v > high ? high : v;
  }
};

template <class T>
struct AcceptRequest {
  const AcceptArgs<T>& a;
  const AcceptWorkspace<T>& w;
  const AcceptFacts& facts;
  const int64_t b = facts.b, drafts = facts.drafts;

  RF_DEVICE int64_t drafted(int64_t j) const {
    return load_constant(a.tokens_in + b * a.drafts + j);
  }
  // Whether the draft's law is a row of logits, not one token.
  RF_DEVICE bool has_draft_rows() const {
    return a.ratio() && a.draft.logits && !facts.greedy && facts.draft_temperature > 0.0;
  }
  RF_DEVICE double coin(int64_t j) const {
    const Words r = words(accept_domain(), static_cast<uint32_t>(j));
    return coin53(r.r[0], r.r[1]);
  }
  RF_DEVICE Words last_words() const { return words(residual_domain(), 0); }
  // A place in the text has its own key in mode match.
  RF_DEVICE RaceRow race_at(int64_t j) const {
    const int64_t first = a.positions ? load_constant(a.positions + b) : 0;
    return {facts.greedy, facts.temperature, fold_in(facts.key, static_cast<uint64_t>(first) + j),
            facts.stream_row};
  }

  RF_DEVICE TileStats<float>* target_stats(int64_t j) const {
    return w.target + (b * (a.drafts + 1) + j) * a.target.tiles();
  }
  RF_DEVICE TileStats<float>* draft_stats(int64_t j) const {
    return w.draft + (b * a.drafts + j) * a.target.tiles();
  }
  RF_DEVICE Racer* racers(int64_t j) const {
    return w.racers + (b * (a.drafts + 1) + j) * a.target.tiles();
  }

  RF_DEVICE AcceptRow<T> uncut_row(int64_t j) const {
    const int64_t first = a.cu_rows ? facts.first_row * a.target.stride : b * a.target_step;
    return {a.target, first + j * a.target.stride, facts.first_row + j, {}, facts.temperature};
  }
  RF_DEVICE AcceptRow<T> target_row(int64_t j) const {
    AcceptRow<T> row = uncut_row(j);
    if (a.filters) row.cut = w.cuts[b * (a.drafts + 1) + j];
    return row;
  }
  RF_DEVICE AcceptRow<T> draft_row(int64_t j) const {
    return {a.draft, b * a.draft_step + j * a.draft.stride, 0, a.columns, facts.draft_temperature};
  }
  // NaN where nothing was saved, or it does not do.
  RF_DEVICE double saved_target(int64_t j) const {
    return a.saved_target() && !facts.greedy ? a.target_lse[facts.first_row + j] : NAN;
  }
  RF_DEVICE double saved_draft(int64_t j) const {
    return a.draft_lse ? a.draft_lse[b * a.drafts + j] : NAN;
  }
  RF_DEVICE bool adopts_target(int64_t j) const {
    return LawRow<T>::adopts(saved_target(j), facts.temperature);
  }
  RF_DEVICE bool adopts_draft(int64_t j) const {
    return LawRow<T>::adopts(saved_draft(j), facts.draft_temperature);
  }
  // `filled`: whoever lacks a saved law has been measured.
  RF_DEVICE LawRow<T> target(int64_t j, bool filled) const {
    LawRow<T> p(target_row(j), filled || a.target_ahead() ? target_stats(j) : nullptr,
                facts.temperature, saved_target(j));
    if (a.mode == AcceptMode::kTypical) p.dot = p.dot_of_tiles();
    return p;
  }
  // Not known where the draft has no row.
  RF_DEVICE LawRow<T> draft(int64_t j, bool filled) const {
    const bool row = has_draft_rows() && j < drafts;
    return {draft_row(j), row && (filled || a.draft_ahead()) ? draft_stats(j) : nullptr,
            facts.draft_temperature, row ? saved_draft(j) : NAN};
  }

  // kOpen where a row is not known yet, or where only sums in float64 can decide.
  RF_DEVICE Verdict judge(int64_t j, const LawRow<T>& p, const LawRow<T>& q) const {
    const int64_t x = j < drafts ? drafted(j) : -1;
    Verdict v{Next::kOpen, 0.0f, p.flags(), 0};
    if (!p.known()) return v;
    if (p.max == -INFINITY) return decided(v, Next::kToken);
    const bool forced = facts.greedy || !p.finite(), match = a.mode == AcceptMode::kMatch;
    const bool against_row = !forced && x >= 0 && has_draft_rows();
    if (against_row && !q.known()) return v;
    // The token that all the mass of a law is on, of the target's or else the draft's.
    const bool point = against_row && !q.finite() && q.max > 0.0f;
    int64_t top = x;
    if (forced || point)
      top = either(forced, p, q).first_maximum();
    else if (match)
      top = best_of_tiles(racers(j), p.count).token;
    else if (against_row)
      top = -1;
    const float z = x >= 0 ? p.row.logit(x) : -INFINITY;
    const double px = p.probability(z);
    v.logprob = p.logprob(z);
    v.token = top;
    if (forced || match) return decided(v, top == x ? Next::kAccept : Next::kToken);
    if (x < 0) return decided(v, Next::kFromTarget);
    if (a.mode == AcceptMode::kTypical) {
      const double least = fmin(a.typical_alpha * exp(-p.entropy()), a.typical_threshold);
      if (!p.exact && fabs(px - least) <= 0x1p-12 * least) return v;
      return decided(v, px > least ? Next::kAccept : Next::kFromTarget);
    }
    const bool row = against_row && q.finite();
    if (against_row) v.status |= q.flags();
    const Next fallen = row ? Next::kResidual : top < 0 ? Next::kFromTarget : Next::kBeside;
    if (!row && x != top) return decided(v, px > 0.0 ? Next::kAccept : fallen);
    // u q(x) < p(x).
    const double uq = coin(j) * (row ? q.probability(q.row.logit(x)) : 1.0);
    const bool exact = p.exact && (!row || q.exact);
    if (!exact && fabs(uq - px) <= 2.0 * kSumError * px) return v;
    return decided(v, uq < px ? Next::kAccept : fallen);
  }

  // A copy: both are looked at by the same code.
  RF_DEVICE static LawRow<T> either(bool first, LawRow<T> one, const LawRow<T>& other) {
    if (!first) one = other;
    return one;
  }

 private:
  RF_DEVICE Words words(uint32_t domain, uint32_t j) const {
    const uint64_t here =
        a.positions ? fold_in(facts.key, static_cast<uint64_t>(load_constant(a.positions + b)))
                    : facts.key;
    return block<kWordRounds>(here, facts.stream_row, j, 0, domain);
  }

  RF_DEVICE static Verdict decided(Verdict v, Next next) {
    v.next = next;
    return v;
  }
};

}  // namespace randfuse::cuda
