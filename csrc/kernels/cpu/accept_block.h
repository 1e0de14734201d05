// Block verification: Sun et al., "Block Verification Accelerates Speculative Decoding", 2024
// (arXiv 2403.10444). Included like simd.h, after accept_request.h. With p_i, q_i the laws at place
// i = 1 ... K and u_i the coins,
//
//   w_0 = 1,  w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i))
//   Z_i = sum max(w_i p_{i+1} - q_{i+1}, 0),  h_i = Z_i / (Z_i + 1 - w_i),  h_K = w_K,  0 / 0 = 1
//   stop = max {i : u_i < h_i}, or 0; then a token of max(w p - q, 0), or of p after K
//
// A later place may stand where an earlier one failed, so all rows are read. Z costs a row pair and
// is taken from the top down, only as far as the stop, whose residual it is.

template <class T>
struct AcceptBlock {
  using Z = cpu::Wide<T>;
  AcceptRequest<T>& request;
  cpu::BlockPlace<Z>* places = request.scratch.places;  // of the laws at each place
  int64_t last = request.drafts;

  // False if a row is not finite: then the request is taken place by place.
  bool run() {
    request.clear();
    for (const bool exact : {false, true}) {
      if (!weigh(exact)) return false;
      if (decide(exact)) return true;
    }
    return true;  // not reached: float64 leaves nothing open
  }

 private:
  // w and the laws of all places.
  bool weigh(bool exact) {
    double w = 1.0;
    for (int64_t i = 0; i < last; ++i) {
      RowDraws<T> p = request.open_target(i), q = request.open_draft(i);
      if (!p.finite() || !q.finite()) return false;
      if (exact) {
        p.make_exact();
        q.make_exact();
      }
      const int64_t x = request.drafted(i);
      const double px = p.probability(x), ratio = px / q.probability(x);
      places[i] = {p.law(), q.law(), w};
      w = px == 0.0 || w == 0.0 ? 0.0 : std::fmin(1.0, w * ratio);
      request.emit(i, x, request.logprob(p, p.law(), x));
    }
    places[last].w = w;
    return true;
  }

  bool decide(bool exact) {
    const double error = exact ? 0.0 : 8.0 * static_cast<double>(last + 1) * kSumError;
    const double over = request.coin(last - 1) - places[last].w;
    if (std::fabs(over) < error) return false;
    if (over < 0.0) {
      RowDraws<T> p = request.open_target(last);
      const auto law = p.law();  // before the draw, which may measure a row whose law was saved
      stop(last, p, law, p.finite() ? request.draw(p) : p.first_maximum());
      return true;
    }
    for (int64_t i = last - 1; i >= 0; --i) {
      RowDraws<T> p = request.target(i), q = request.draft(i);
      p.adopt(places[i].target);
      q.adopt(places[i].draft);
      const double w = places[i].w;
      Residual<T> left(p, q, w, request.scratch.residual, exact);
      const double whole = left.total + (1.0 - w);  // h = 1 where w = 1, to the last bit
      if (i > 0) {
        const double above = request.coin(i - 1) * whole - left.total;
        if (std::fabs(above) < error) return false;
        if (above >= 0.0 && whole > 0.0) continue;
      }
      const int64_t y = left.draw(request.last_words());
      stop(i, p, places[i].target, y >= 0 ? y : request.draw(p));
      return true;
    }
    return true;  // not reached: place 0 stops
  }

  void stop(int64_t i, RowDraws<T>& p, const typename RowDraws<T>::Law& law, int64_t token) {
    for (int64_t j = i + 1; j < last; ++j) request.emit(j, -1, 0.0);
    request.emit(i, token, request.logprob(p, law, token));
    request.finish(i);
  }
};

template <class T>
bool accept_block(AcceptRequest<T>& request) {
  const bool block = request.a.mode == cpu::AcceptMode::kBlock;
  if (!block || !request.has_draft_rows() || request.drafts == 0) return false;
  return AcceptBlock<T>{request}.run();
}
