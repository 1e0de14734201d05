// 2 launches, 3 in mode block; filters take 2 more, as in categorical_sample.
//
//   stats   a warp a tile of 1024 tokens, rows in the order of their places: the first of all
//           requests, then the second. Bytes: the logits once, 32 a tile. With `words`, the last
//           block of a place passes its verdict, and a row of a later place is not read once an
//           earlier place has fallen. That saves bytes only: the verdict is passed again below, and
//           rows up to the stop are always read. Nothing was saved of the rows that are read here.
//   accept  a block a request: verdicts, a warp a place, from the statistics and one
//           logit of each row; then the token. A residual reads the stop row pair again, other
//           draws one tile (residual.cuh). Mode block: row pairs from the top down (accept_block).
//
// Estimated latency of a request at V = 151936 once the statistics are there: 3 us for the
// verdicts, 2 for a draw, 7 more for a residual.
#pragma once
#include "accept_block.cuh"

namespace randfuse::cuda {

inline constexpr size_t kAcceptCutShared =
    kWarps * SharedTile::kSize * sizeof(double) + kBins * sizeof(Bin);

// A block of the first launch: some tiles of one row.
template <class T>
struct AcceptChunk {
  int64_t place, request;
  bool draft;
  int tile;

  RF_DEVICE static int per_row(const AcceptArgs<T>& a) {
    return (a.target.tiles() + kWarps - 1) / kWarps;
  }
  RF_DEVICE AcceptChunk(const AcceptArgs<T>& a, int sides) {
    const uint32_t chunks = per_row(a), row = blockIdx.x / chunks, pair = row / sides;
    tile = static_cast<int>(blockIdx.x % chunks * kWarps + threadIdx.x / 32);
    draft = sides == 2 ? row % 2 != 0 : !a.target_ahead();
    request = pair % static_cast<uint32_t>(a.requests);
    place = pair / static_cast<uint32_t>(a.requests);
  }
};

enum class Read { kSums, kDots, kRace };  // dots: mode typical; race: mode match

// Statistics of one tile, once the cuts are known (`again`) of what they leave; the race.
template <class T, Read kRead>
RF_DEVICE void read_tile(const AcceptRequest<T>& request, const AcceptRow<T>& row, int64_t place,
                         int tile, bool again, TileStats<float>* stats) {
  constexpr int kRun = kRead == Read::kRace ? 4 : 8;
  const double inverse = 1.0 / row.temperature;
  TileStats<float> own{-INFINITY, -INFINITY, 0.0, 0.0, again && stats->has_nan};
  const bool empty = again && stats->max < row.cut.value;
  Racer best{-INFINITY, 0};
  __syncwarp();
  if (!empty) {
    WarpTile<T, kRun> logits = row.template read<kRun>(tile);
    const bool had_nan = own.has_nan;
    own = tile_stats<kRead == Read::kDots>(logits, inverse);
    own.has_nan = own.has_nan || had_nan;
    if constexpr (kRead == Read::kRace) {
      if (!request.facts.greedy && (again || !request.a.filters)) {
        const RaceRow race = request.race_at(place);
        best = TileRace<T>(logits, race, static_cast<uint32_t>(tile) * (kTile / 4))
                   .run(0, int64_t{tile} * kTile);
      }
    }
  }
  if (threadIdx.x % 32 != 0) return;
  *stats = own;
  if (kRead == Read::kRace) request.racers(place)[tile] = best;
}

template <class T, Read kRead>
__global__ void __launch_bounds__(kThreads, kRead == Read::kRace ? 1 : 2)
    accept_stats_kernel(const AcceptArgs<T> a, const AcceptWorkspace<T> w, int sides, bool again) {
  RF_SHARED(uint32_t, word, 0, 1);
  const AcceptChunk<T> chunk(a, sides);
  const int64_t j = chunk.place;
  const AcceptFacts facts(a, chunk.request);
  const AcceptRequest<T> request{a, w, facts};
  const bool draft_row = j < request.drafts && request.has_draft_rows();
  if (facts.rows == 0 || (chunk.draft ? !draft_row : j > request.drafts)) return;
  // Words of a request: K + 2 less the first place that fell, and blocks of each place that are
  // done.
  uint32_t* const words = a.words ? a.words + chunk.request * (a.drafts + 2) : nullptr;
  if (words) {
    if (threadIdx.x == 0) *word = *const_cast<const volatile uint32_t*>(words);
    __syncthreads();
    if (a.drafts + 2 - *word < j) return;
  }
  if (chunk.tile < a.target.tiles()) {
    const AcceptRow<T> row = chunk.draft ? request.draft_row(j)
                             : again     ? request.target_row(j)
                                         : request.uncut_row(j);  // cuts are not known yet
    TileStats<float>* stats = chunk.draft ? request.draft_stats(j) : request.target_stats(j);
    read_tile<T, kRead>(request, row, j, chunk.tile, again, stats + chunk.tile);
  }
  if (!words || j >= request.drafts) return;
  __syncthreads();
  const uint32_t blocks = AcceptChunk<T>::per_row(a) * (sides == 2 && draft_row ? 2 : 1);
  if (threadIdx.x == 0) {
    __threadfence();  // what the block has written is there before it counts as done
    *word = atomicAdd(words + 1 + j, 1u);
  }
  __syncthreads();
  if (*word + 1 != blocks || threadIdx.x >= 32) return;
  __threadfence();
  const Verdict v = request.judge(j, request.target(j, false), request.draft(j, false));
  if (threadIdx.x == 0 && v.next != Next::kOpen && v.next != Next::kAccept)
    atomicMax(words, static_cast<uint32_t>(a.drafts + 2 - j));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    accept_cuts_kernel(const AcceptArgs<T> a, const AcceptWorkspace<T> w) {
  RF_SHARED(double, memory, 0, kWarps* SharedTile::kSize);
  RF_SHARED(Bin, bins, kWarps * SharedTile::kSize * sizeof(double), kBins);
  const uint32_t places = static_cast<uint32_t>(a.drafts + 1);
  const int64_t b = blockIdx.x / places, j = blockIdx.x % places;
  const AcceptFacts facts(a, b);
  if (j > facts.drafts || facts.rows == 0) return;
  const AcceptRequest<T> request{a, w, facts};
  const LogitRows<T> row = request.uncut_row(j).alone();
  const RowDraws<CutRow<T>> draws({row, 0, no_cut()}, request.target_stats(j), facts.temperature);
  const Cut<float> cut = find_cut(draws, a.top_k.at(b), a.top_p.at(b), a.min_p.at(b), bins,
                                  memory + threadIdx.x / 32 * SharedTile::kSize);
  if (threadIdx.x == 0) w.cuts[blockIdx.x] = cut;
}

// Place by place until a draft falls.
template <class T>
RF_DEVICE void walk(const AcceptTeam<T>& team) {
  const AcceptRequest<T>& request = team.request;
  const uint32_t fell = request.a.words ? request.a.words[request.b * (request.a.drafts + 2)] : 0;
  const int64_t last =
      fell != 0 ? min(request.a.drafts + 2 - fell, request.drafts) : request.drafts;
  int64_t status = 0;
#pragma unroll 1
  for (int64_t first = 0;; first += team.warps) {
    for (int64_t j = first; j <= last && j < first + team.warps; ++j) team.measure_missing(j);
    __syncthreads();
    if (first + team.warp <= last) {
      const int64_t j = first + team.warp;
      LawPair<T>& laws = team.memory.laws[team.warp];
      team.look(j, &laws);
      const Verdict own = request.judge(j, laws.p, laws.q);
      if (team.leads()) team.memory.verdicts[team.warp] = own;
    }
    __syncthreads();
#pragma unroll 1
    for (int64_t j = first; j < first + team.warps; ++j) {
      Verdict v = team.memory.verdicts[j - first];
      if (v.next != Next::kAccept) team.open(team.memory.laws[j - first]);
      int64_t token = kUndecided;
#pragma unroll 1
      for (bool exact = false;; exact = true) {
        if (exact) {
          team.make_exact();
          v = request.judge(j, team.memory.p, team.memory.q);
        }
        if (v.next == Next::kOpen) continue;
        token = v.token;
        if (v.next == Next::kResidual)
          token = Residual<T>{team, 1.0, exact}.draw(request.last_words());
        if (token != kUndecided) break;
      }
      status |= v.status;
      if (v.next == Next::kAccept) {
        if (threadIdx.x == 0) team.emit(j, request.drafted(j), v.logprob);
        continue;
      }
      if (v.next == Next::kFromTarget || v.next == Next::kBeside || token == kNothing)
        token = team.draw(j, v.next == Next::kBeside ? v.token : -1);
      return team.stop(j, token, status);
    }
  }
}

// Mode block is a launch of its own; requests that it is not for are left to the walk.
template <class T, bool kBlock>
__global__ void __launch_bounds__(32 * kTeamWarps, 1)
    accept_kernel(const AcceptArgs<T> a, const AcceptWorkspace<T> w) {
  RF_SHARED(TeamMemory<T>, memory, 0, 1);
  const AcceptFacts local(a, blockIdx.x);
  if (threadIdx.x == 0) memory->facts = local;
  __syncthreads();
  const AcceptRequest<T> request{a, w, memory->facts};
  const AcceptTeam<T> team{request, *memory};
  const bool whole = a.mode == AcceptMode::kBlock && request.has_draft_rows() && request.drafts > 0;
  if constexpr (kBlock) {
    const bool done = whole && AcceptBlock<T>{team}.run();
    if (!done && threadIdx.x == 0) a.num_accepted[request.b] = -1;
    return;
  }
  if (whole && a.num_accepted[request.b] >= 0) return;
  if (request.facts.rows > 0) return walk(team);
#pragma unroll 1  // unrolled, its count would be a division
  for (int64_t j = threadIdx.x; j <= a.drafts; j += blockDim.x) team.emit(j, -1, 0.0f);
  if (threadIdx.x == 0) a.num_accepted[request.b] = a.status[request.b] = 0;
}

}  // namespace randfuse::cuda
