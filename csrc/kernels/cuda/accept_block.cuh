// Block verification, whose equations kernels/cpu/accept_block.h has: w of all places from the
// statistics of all rows, then row pairs from the top down, only as far as one stands.
//
// Rounding: w and h are sums and products of at most 8 (K + 1) laws' errors; a coin within that of
// its bound has the whole request taken again in float64.
#pragma once
#include "residual.cuh"

namespace randfuse::cuda {

template <class T>
struct AcceptBlock {
  const AcceptTeam<T>& team;
  const AcceptRequest<T>& request = team.request;
  const int64_t last = request.drafts;
  BlockPlace* const places = request.w.places + request.b * (request.a.drafts + 1);
  int64_t status = 0;

  // False if a row is not finite: then the request is taken place by place.
  RF_DEVICE bool run() {
    for (int64_t j = 0; j <= last; ++j) team.measure_missing(j);
    __syncthreads();
#pragma unroll 1
    for (int exact = 0; exact < 2; ++exact) {
      if (!weigh(exact != 0)) return false;
      if (decide(exact != 0)) return true;
    }
    return true;  // not reached: float64 leaves nothing open
  }

 private:
  RF_DEVICE void open(int64_t i) const {
    __syncthreads();
    if (team.warp == 0) team.look(i, &team.memory);
    __syncthreads();
  }

  // The laws of all places and w: a warp a place, or, exact, the block a place.
  RF_DEVICE bool weigh(bool exact) {
    Verdict own{Next::kAccept, 0.0f, 0, 0};
    for (int64_t i = exact ? 0 : team.warp; i < last; i += exact ? 1 : team.warps) {
      if (exact) {
        open(i);
        team.make_exact();
      }
      const LawRow<T> p = exact ? team.memory.p : request.target(i, true);
      const LawRow<T> q = exact ? team.memory.q : request.draft(i, true);
      own.status |= p.flags() | q.flags();
      if (!p.finite() || !q.finite()) own.next = Next::kOpen;
      const int64_t x = request.drafted(i);
      const float z = p.row.logit(x);
      const double px = p.probability(z), qx = q.probability(q.row.logit(x));
      if (!team.leads() || (exact && team.warp != 0)) continue;
      places[i] = {px == 0.0 ? 0.0 : px / qx, p.total, q.total};
      team.emit(i, x, p.logprob(z));
    }
    if (team.leads()) team.memory.verdicts[team.warp] = own;
    __syncthreads();
    bool finite = true;
    status = 0;
    for (int i = 0; i < team.warps; ++i) {
      finite = finite && team.memory.verdicts[i].next == Next::kAccept;
      status |= team.memory.verdicts[i].status;
    }
    double w = 1.0;
    for (int64_t i = 0; threadIdx.x == 0 && i <= last; ++i) {
      const double before = w;
      if (i < last) w = w == 0.0 ? 0.0 : fmin(1.0, w * places[i].w);
      places[i].w = before;
    }
    __syncthreads();
    return finite;
  }

  RF_DEVICE bool decide(bool exact) {
    const double error = exact ? 0.0 : 8.0 * static_cast<double>(last + 1) * kSumError;
    const double over = request.coin(last - 1) - places[last].w;
    if (fabs(over) < error) return false;
    for (int64_t i = over < 0.0 ? last : last - 1;; --i) {
      open(i);
      const LawRow<T>& p = team.memory.p;
      int64_t token = kNothing;
      if (i == last) {
        status |= p.flags();
        if (!p.finite()) token = p.first_maximum();
      } else {
        adopt(places[i], exact);
        Residual<T> left{team, places[i].w, exact};
        left.sum();
        const double whole = left.total + (1.0 - left.w);  // h = 1 where w = 1, to the last bit
        if (i > 0) {
          const double above = request.coin(i - 1) * whole - left.total;
          if (fabs(above) < error) return false;
          if (above >= 0.0 && whole > 0.0) continue;
        }
        token = left.draw(request.last_words());
        if (token == kUndecided) {
          team.make_exact();
          token = Residual<T>{team, left.w, true}.draw(request.last_words());
        }
      }
      team.stop(i, token == kNothing ? team.draw(i, -1) : token, status);
      return true;
    }
  }

  // Totals that were found once.
  RF_DEVICE void adopt(const BlockPlace& place, bool exact) const {
    if (threadIdx.x == 0) {
      LawRow<T>&p = team.memory.p, &q = team.memory.q;
      p.total = place.target_total, p.exact = p.exact || exact;
      q.total = place.draft_total, q.exact = q.exact || exact;
    }
    __syncthreads();
  }
};

}  // namespace randfuse::cuda
