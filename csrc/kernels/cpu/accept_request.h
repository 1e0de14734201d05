// One request, place by place until a draft falls. Included like simd.h, after residual.h.

template <class T>
struct AcceptRequest {
  using Z = cpu::Wide<T>;
  using Law = typename RowDraws<T>::Law;
  const cpu::AcceptArgs<T>& a;
  const int64_t b;
  cpu::AcceptScratch<Z>& scratch;
  const double temperature, draft_temperature;
  uint64_t key;
  uint32_t stream_row;
  int64_t drafts = 0;      // that can be verified: up to the first id that is none
  int64_t after_last = 0;  // status if all of them stand
  int64_t status = 0;

  AcceptRequest(const cpu::AcceptArgs<T>& args, int64_t request, cpu::AcceptScratch<Z>& s)
      : a(args),
        b(request),
        scratch(s),
        temperature(a.temperature.at(b, 1.0)),
        draft_temperature(a.draft_temperature.at(b, temperature)),
        key(static_cast<uint64_t>(a.keys[b / a.requests_per_key])),
        stream_row(static_cast<uint32_t>(b % a.requests_per_key)) {
    const int64_t given = a.num_drafts ? a.num_drafts[b] : a.rows_of(b) - 1;
    while (drafts < given && 0 <= drafted(drafts) && drafted(drafts) < a.target.vocab) ++drafts;
    if (drafts < given && drafted(drafts) != -1) after_last = cpu::kBadId;
  }

  bool greedy() const { return temperature == 0.0; }
  int64_t drafted(int64_t j) const { return a.tokens_in[b * a.drafts + j]; }
  int64_t target_row(int64_t j) const { return a.rows_before(b) + j; }
  int64_t draft_row(int64_t j) const { return b * a.drafts + j; }

  // Whether the draft's law is a row of logits, not one token.
  bool has_draft_rows() const {
    const bool ratio = a.mode == cpu::AcceptMode::kToken || a.mode == cpu::AcceptMode::kBlock;
    return ratio && a.draft.logits && !greedy() && draft_temperature > 0.0;
  }

  RowDraws<T> target(int64_t j) const {
    return {a.target, target_row(j), greedy() ? 1.0 : temperature, scratch.target};
  }
  RowDraws<T> draft(int64_t j) const {
    return {a.draft, draft_row(j), draft_temperature, scratch.draft};
  }

  // NaN where the log-sum-exp of a row was not saved, or does not do.
  double saved_target(int64_t j) const {
    const bool enough = !greedy() && a.mode != cpu::AcceptMode::kTypical;
    return a.target_lse && enough ? a.target_lse[target_row(j)] : NAN;
  }
  double saved_draft(int64_t j) const { return a.draft_lse ? a.draft_lse[draft_row(j)] : NAN; }

  RowDraws<T> open_target(int64_t j) {
    RowDraws<T> p = target(j);
    const int64_t top_k = a.top_k.at(b, a.target.vocab);
    const double top_p = a.top_p.at(b, 1.0), min_p = a.min_p.at(b, 0.0);
    const bool filtered = top_k < a.target.vocab || top_p < 1.0 || min_p > 0.0;
    const bool races = a.mode == cpu::AcceptMode::kMatch && !greedy() && !a.racers;
    // The race first: its arithmetic covers the read from memory, that of the statistics does not.
    if (races && !filtered) p.race(coins_at(j), 1);
    if (p.adopt(saved_target(j))) return p;
    measure(p, a.stats ? a.stats_of(b, j) : nullptr);
    flag(p);
    if (p.finite() && filtered) {
      p.cut(top_k, top_p, min_p);
      measure(p, nullptr);
      if (races) p.race(coins_at(j), 1);
    }
    return p;
  }
  RowDraws<T> open_draft(int64_t j) {
    RowDraws<T> q = draft(j);
    if (q.adopt(saved_draft(j))) return q;
    q.template measure<false>(a.stats ? a.stats_of(b, a.drafts + 1 + j) : nullptr);
    flag(q);
    return q;
  }

  double coin(int64_t j) const {
    const Words w = coins().block(accept_domain(), static_cast<uint32_t>(j), 0);
    return coin53(w.r[0], w.r[1]);
  }
  Words last_words() const { return coins().block(residual_domain(), 0, 0); }
  // A place in the text has its own key in mode match.
  Coins coins_at(int64_t j) const {
    const int64_t first = a.positions ? a.positions[b] : 0;
    return {fold_in(key, static_cast<uint64_t>(first + j)), stream_row};
  }

  void run() {
    clear();
    if (a.rows_of(b) == 0) return;
    for (int64_t j = 0;; ++j) {
      RowDraws<T> p = open_target(j);
      const Law law = p.law();
      const Choice next = choose(p, j);
      p.reader.banned = -1;
      emit(j, next.token, logprob(p, law, next.token));
      if (!next.accepted) return finish(j);
    }
  }

  void clear() {
    status = 0;
    for (int64_t j = 0; j <= a.drafts; ++j) emit(j, -1, 0.0);
    a.num_accepted[b] = a.status[b] = 0;
  }
  void emit(int64_t j, int64_t token, double logprob) {
    a.tokens[b * (a.drafts + 1) + j] = token;
    a.logprobs[b * (a.drafts + 1) + j] = static_cast<Z>(logprob);
  }
  void finish(int64_t accepted) {
    a.num_accepted[b] = accepted;
    a.status[b] = status | (accepted == drafts ? after_last : 0);
  }

  double logprob(RowDraws<T>& p, const Law& law, int64_t token) {
    if (law.max - law.max != 0) return law.max > 0 ? 0.0 : NAN;
    const double gap = static_cast<double>(p.logit(token)) - static_cast<double>(law.max);
    return gap * p.inverse - std::log(law.total);
  }

  // A draw from p, whose tiles need not have been measured yet.
  int64_t draw(RowDraws<T>& p) {
    if (!p.measured) p.template measure<false>();
    return p.by_mass(last_words());
  }

 private:
  struct Choice {
    int64_t token;
    bool accepted;
  };

  Coins coins() const {
    return {a.positions ? fold_in(key, static_cast<uint64_t>(a.positions[b])) : key, stream_row};
  }

  void measure(RowDraws<T>& p, const TileStats<Z>* known) {
    if (a.mode == cpu::AcceptMode::kTypical)
      p.template measure<true>(known);
    else
      p.template measure<false>(known);
  }

  void flag(const RowDraws<T>& row) {
    if (row.has_nan) status |= cpu::kNaN;
    if (row.max == static_cast<Z>(INFINITY)) status |= cpu::kPosInf;
    if (row.max == static_cast<Z>(-INFINITY)) status |= cpu::kNoSupport;
  }

  // The token at place j, and whether it is the draft standing.
  Choice choose(RowDraws<T>& p, int64_t j) {
    const int64_t x = j < drafts ? drafted(j) : -1;
    if (p.max == static_cast<Z>(-INFINITY)) return {0, false};
    if (greedy() || !p.finite()) return matched(p.first_maximum(), x);
    if (a.mode == cpu::AcceptMode::kMatch) return matched(winner(j), x);
    if (x < 0) return {draw(p), false};
    if (a.mode == cpu::AcceptMode::kTypical) {
      if (is_typical(p, x)) return {x, true};
      return {draw(p), false};
    }
    return against_draft(p, j, x);
  }

  static Choice matched(int64_t token, int64_t x) { return {token, token == x}; }

  // Who won the race at place j, which has been run.
  int64_t winner(int64_t j) const {
    if (!a.racers) return scratch.target.racers[0].token;
    const cpu::Racer *racers = a.racers_of(b, j), *best = racers;
    for (int64_t s = 1; s < a.spans(); ++s)
      if (racers[s].score > best->score) best = racers + s;
    return best->token;
  }

  // p(x) > min(threshold, alpha exp(-H)).
  bool is_typical(RowDraws<T>& p, int64_t x) {
    for (;;) {
      const double bound = a.typical_alpha * std::exp(-p.facts().entropy);
      const double least = bound < a.typical_threshold ? bound : a.typical_threshold;
      const double px = p.probability(x);
      if (p.exact || std::fabs(px - least) > 0x1p-12 * least) return px > least;
      p.template make_exact<true>();
    }
  }

  Choice against_draft(RowDraws<T>& p, int64_t j, int64_t x) {
    int64_t point = x;  // where the draft's law is one token
    if (has_draft_rows()) {
      RowDraws<T> q = open_draft(j);
      if (q.finite()) {
        if (passes(coin(j), p, &q, x)) return {x, true};
        const int64_t y = Residual<T>(p, q, 1.0, scratch.residual, false).draw(last_words());
        return {y >= 0 ? y : draw(p), false};
      }
      point = q.max > 0 ? q.first_maximum() : -1;
    }
    if (x == point ? passes(coin(j), p, nullptr, x) : p.probability(x) > 0.0) return {x, true};
    if (point < 0) return {draw(p), false};
    if (!p.measured) p.template measure<false>();
    p.ban(point);
    return {p.finite() ? draw(p) : point, false};
  }

  // u q(x) < p(x); q = 1 without a row.
  bool passes(double u, RowDraws<T>& p, RowDraws<T>* q, int64_t x) {
    for (;;) {
      const double px = p.probability(x), uq = u * (q ? q->probability(x) : 1.0);
      const bool exact = p.exact && (!q || q->exact);
      if (exact || std::fabs(uq - px) > 2.0 * kSumError * px) return uq < px;
      p.make_exact();
      if (q) q->make_exact();
    }
  }
};
