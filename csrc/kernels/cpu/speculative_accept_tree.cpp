#include "speculative_accept_tree.h"

#include <algorithm>
#include <cmath>

#include "speculative_accept.h"  // the bits of the status

namespace randfuse::cpu {

void tree_keys(const TreeKeysArgs& a, int64_t request_begin, int64_t request_end) {
  for (int64_t b = request_begin; b < request_end; ++b) {
    const uint64_t key = static_cast<uint64_t>(a.keys[a.shared ? 0 : b]),
                   own = a.shared ? fold_in(key, static_cast<uint64_t>(b)) : key;
    const uint64_t first = a.positions ? static_cast<uint64_t>(a.positions[b]) : 0;
    const int64_t* parents = a.parents + b * a.drafts;
    int64_t* out = a.node_keys + b * (a.drafts + 1);
    out[0] = 0;  // depths first
    for (int64_t n = 0; n < a.drafts; ++n) out[n + 1] = out[parents[n]] + 1;
    for (int64_t n = 0; n <= a.drafts; ++n)
      out[n] = static_cast<int64_t>(fold_in(own, first + static_cast<uint64_t>(out[n])));
  }
}

template <class T>
void accept_path(const AcceptPathArgs<T>& a, int64_t request_begin, int64_t request_end) {
  for (int64_t b = request_begin; b < request_end; ++b) {
    const int64_t row = b * (a.num_drafts + 1), end = row + a.num_drafts + 1;
    const int64_t *drafts = a.drafts + b * a.num_drafts, *parents = a.parents + b * a.num_drafts;
    int64_t at = row, status = 0;
    for (int64_t node = 0, next = 0; next >= 0; node = next) {
      const int64_t token = a.drawn[row + node];
      const T lse = a.logsumexp[row + node];
      const bool empty = lse == -INFINITY;
      if (!std::isfinite(lse)) status |= std::isnan(lse) ? kNaN : empty ? kNoSupport : kPosInf;
      a.tokens[at] = token;
      a.logprobs[at] = a.logprob[row + node];
      a.node_ids[at++] = node;
      next = -1;
      for (int64_t n = node; n < a.num_drafts; ++n) {
        if (parents[n] != node) continue;
        if (drafts[n] < -1 || drafts[n] >= a.vocab) status |= kBadId;
        if (next < 0 && drafts[n] == token && !empty) next = n + 1;  // the first of twins
      }
    }
    a.num_accepted[b] = at - row - 1;
    a.status[b] = status;
    std::fill(a.tokens + at, a.tokens + end, -1);
    std::fill(a.logprobs + at, a.logprobs + end, T{0});
    std::fill(a.node_ids + at, a.node_ids + end, -1);
  }
}

template void accept_path<float>(const AcceptPathArgs<float>&, int64_t, int64_t);
template void accept_path<double>(const AcceptPathArgs<double>&, int64_t, int64_t);

}  // namespace randfuse::cpu
