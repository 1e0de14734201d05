// speculative_accept: schema, checks, allocation, threads.
#include "../kernels/cpu/speculative_accept.h"

#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "sampling.h"

namespace randfuse {
namespace {

constexpr const char* kOp = "speculative_accept";

cpu::AcceptMode mode_of(c10::string_view name) {
  if (name == "token") return cpu::AcceptMode::kToken;
  if (name == "block") return cpu::AcceptMode::kBlock;
  if (name == "match") return cpu::AcceptMode::kMatch;
  TORCH_CHECK_VALUE(name == "typical", kOp,
                    ": mode must be 'token', 'block', 'match' or 'typical', got '", name, "'");
  return cpu::AcceptMode::kTypical;
}

// An integer tensor (n,) as contiguous int64.
Tensor integers(const char* name, const Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, kOp, ": ", name, " must be int64, got ",
                   dtype_name(x));
  TORCH_CHECK_VALUE(x.is_cpu() && x.sizes() == shape, kOp, ": ", name, " must have shape ", shape,
                    " on cpu, got ", x.sizes(), " on ", x.device());
  return x.contiguous();
}

// Log-sum-exps of rows as contiguous float64.
Tensor saved(const char* name, const OptionalTensor& x, at::IntArrayRef shape) {
  if (!x.has_value()) return {};
  TORCH_CHECK_TYPE(x->is_floating_point(), kOp, ": ", name, " must be floating, got ",
                   dtype_name(*x));
  TORCH_CHECK_VALUE(x->is_cpu() && x->sizes() == shape, kOp, ": ", name, " must have shape ", shape,
                    " on cpu, got ", x->sizes(), " on ", x->device());
  return x->to(at::kDouble).contiguous();
}

// Columns of the draft's rows in order of the tokens that they mean.
struct Columns {
  Tensor token, column;

  Columns(const Tensor& map, int64_t vocab) {
    const Tensor given = integers("draft_to_target", map, map.sizes());
    TORCH_CHECK_VALUE(map.dim() == 1, kOp, ": draft_to_target must have one dimension, got ",
                      map.sizes());
    const int64_t* v = given.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < given.numel(); ++k)
      TORCH_CHECK_VALUE(0 <= v[k] && v[k] < vocab, kOp, ": draft_to_target must be in [0, ", vocab,
                        "), got ", v[k]);
    std::tie(token, column) = at::sort(given, /*stable=*/true, 0, /*descending=*/false);
  }
};

// Where each request's rows begin; every number of drafts that follows from it is in [0, K].
Tensor checked_rows(const Tensor& cu, int64_t requests, int64_t drafts, int64_t rows) {
  const Tensor own = integers("cu_num_logits", cu, {requests + 1});
  const int64_t* v = own.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(v[0] >= 0 && v[requests] <= rows, kOp, ": cu_num_logits must be in [0, ", rows,
                    "], the rows of target_logits, got ", v[0], " … ", v[requests]);
  for (int64_t b = 0; b < requests; ++b)
    TORCH_CHECK_VALUE(v[b] <= v[b + 1] && v[b + 1] <= v[b] + drafts + 1, kOp,
                      ": cu_num_logits must rise by 0 … K + 1 = ", drafts + 1, " a request, got ",
                      v[b + 1] - v[b]);
  return own;
}

Tensor checked_drafts(const Tensor& num_drafts, int64_t requests, int64_t drafts) {
  const Tensor own = integers("num_drafts", num_drafts, {requests});
  const int64_t* v = own.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < requests; ++b)
    TORCH_CHECK_VALUE(0 <= v[b] && v[b] <= drafts, kOp, ": num_drafts must be in [0, K] = [0, ",
                      drafts, "], got ", v[b]);
  return own;
}

template <class V>
const V* data(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<V>() : nullptr;
}

// One task a request; where those are fewer than threads, tiles of all rows first.
template <class T>
void run(cpu::AcceptArgs<T>& args, bool race_ahead) {
  using Z = cpu::Wide<T>;
  std::vector<TileStats<Z>> stats;
  std::vector<cpu::Racer> racers;
  const int64_t spans = args.requests * args.places() * args.spans();
  if (args.requests < at::get_num_threads() && spans > args.places()) {
    stats.resize(args.requests * args.places() * args.tiles());
    args.stats = stats.data();
    if (race_ahead) racers.resize(spans);
    args.racers = race_ahead ? racers.data() : nullptr;
    parallel_groups(
        spans, [&](int64_t begin, int64_t end) { cpu::accept_stats<T>(args, begin, end); }, 1);
  }
  parallel_groups(
      args.requests,
      [&](int64_t begin, int64_t end) { cpu::speculative_accept<T>(args, begin, end); }, 1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> speculative_accept_cpu(
    const Tensor& target_logits, const Tensor& draft_token_ids, const Tensor& key,
    const OptionalTensor& draft_logits, const OptionalTensor& num_drafts,
    const OptionalTensor& cu_num_logits, const Tensor& temperature,
    const OptionalTensor& draft_temperature, const OptionalTensor& top_k,
    const OptionalTensor& top_p, const OptionalTensor& min_p, const OptionalTensor& bitmask,
    c10::string_view mode, double typical_threshold, double typical_alpha,
    const OptionalTensor& draft_logsumexp, const OptionalTensor& target_logsumexp,
    const OptionalTensor& draft_to_target, const OptionalTensor& positions) {
  check_float(kOp, "target_logits", target_logits);
  TORCH_CHECK_VALUE(draft_token_ids.dim() == 2, kOp,
                    ": draft_token_ids must have shape (B, K), got ", draft_token_ids.sizes());
  const int64_t requests = draft_token_ids.size(0), drafts = draft_token_ids.size(1);
  const Tensor tokens_in = integers("draft_token_ids", draft_token_ids, {requests, drafts});
  const bool packed = cu_num_logits.has_value();
  TORCH_CHECK_VALUE(
      target_logits.dim() == (packed ? 2 : 3) &&
          (packed || (target_logits.size(0) == requests && target_logits.size(1) == drafts + 1)),
      kOp, ": target_logits must have shape (B, K + 1, V), or (rows, V) with cu_num_logits, got ",
      target_logits.sizes());
  TORCH_CHECK_VALUE(!packed || !num_drafts.has_value(), kOp,
                    ": num_drafts must be None with cu_num_logits, got both");
  const Rows shape = rows_of(target_logits);
  TORCH_CHECK_VALUE(1 <= shape.cols && shape.cols <= kMaxVocab, kOp,
                    ": target_logits must have V in [1, 2**20], got ", target_logits.sizes());
  const at::IntArrayRef per_row = target_logits.sizes().slice(0, target_logits.dim() - 1);
  const KeyedStream stream = mask_stream(kOp, key, target_logits.device(), requests, shape.cols,
                                         static_cast<int64_t>(Op::kAcceptCoin), 0, 0, 0);
  const SamplingParameters parameters(kOp, requests, temperature, top_k, top_p, min_p);
  const RowParameter<double> draft_warmth(kOp, "draft_temperature", draft_temperature, requests,
                                          "0 or in [2**-100, 2**100]", SamplingParameters::warm);
  const bool filtered = top_k.has_value() || top_p.has_value() || min_p.has_value();
  TORCH_CHECK_VALUE(!filtered || !target_logsumexp.has_value(), kOp,
                    ": target_logsumexp must be None with top_k, top_p or min_p, got both");

  const Tensor target = with_row_layout(target_logits);
  Tensor draft, mask, cu, counts, places;
  std::optional<Columns> columns;
  TORCH_CHECK_VALUE(draft_logits.has_value() || !draft_to_target.has_value(), kOp,
                    ": draft_to_target must be None without draft_logits, got a Tensor");
  if (draft_to_target.has_value()) columns.emplace(*draft_to_target, shape.cols);
  if (draft_logits.has_value()) {
    check_like(kOp, "draft_logits", *draft_logits, target_logits);
    const int64_t width = columns ? columns->token.numel() : shape.cols;
    TORCH_CHECK_VALUE(draft_logits->sizes() == at::IntArrayRef({requests, drafts, width}), kOp,
                      ": draft_logits must have shape (B, K, V) = (", requests, ", ", drafts, ", ",
                      width, "), got ", draft_logits->sizes());
    draft = with_row_layout(*draft_logits);
  }
  const int64_t words = (shape.cols + 31) / 32;
  if (bitmask.has_value()) {
    std::vector<int64_t> expected = per_row.vec();
    expected.push_back(words);
    TORCH_CHECK_TYPE(bitmask->scalar_type() == at::kInt, kOp, ": bitmask must be int32, got ",
                     dtype_name(*bitmask));
    TORCH_CHECK_VALUE(bitmask->is_cpu() && bitmask->sizes() == expected, kOp,
                      ": bitmask must have shape ", expected, " on cpu, got ", bitmask->sizes(),
                      " on ", bitmask->device());
    mask = bitmask->contiguous();
  }
  if (packed) cu = checked_rows(*cu_num_logits, requests, drafts, shape.rows);
  if (num_drafts.has_value()) counts = checked_drafts(*num_drafts, requests, drafts);
  if (positions.has_value()) places = integers("positions", *positions, {requests});
  const Tensor target_lse = saved("target_logsumexp", target_logsumexp, per_row);
  const Tensor draft_lse = saved("draft_logsumexp", draft_logsumexp, {requests, drafts});

  const auto like = target_logits.options();
  const Tensor tokens = at::empty({requests, drafts + 1}, like.dtype(at::kLong));
  const Tensor accepted = at::empty({requests}, like.dtype(at::kLong));
  const Tensor status = at::empty({requests}, like.dtype(at::kLong));
  const Tensor logprobs =
      at::empty({requests, drafts + 1},
                like.dtype(target_logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  dispatch_float(target_logits, [&](auto type) {
    using T = decltype(type);
    cpu::AcceptArgs<T> args{};
    args.target = {in<T>(target), row_layout(target), shape.cols};
    args.target.bitmask = data<int32_t>(mask);
    args.target.bitmask_words = words;
    if (draft.defined()) {
      args.draft = {in<T>(draft), row_layout(draft), shape.cols};
      if (columns) {
        args.draft.token = data<int64_t>(columns->token);
        args.draft.column = data<int64_t>(columns->column);
        args.draft.num_columns = columns->token.numel();
      }
    }
    args.requests = requests;
    args.drafts = drafts;
    args.cu_rows = data<int64_t>(cu);
    args.num_drafts = data<int64_t>(counts);
    args.tokens_in = data<int64_t>(tokens_in);
    args.keys = stream.keys;
    args.requests_per_key = stream.rows_per_key;
    args.positions = data<int64_t>(places);
    args.temperature = parameters.temperature;
    args.draft_temperature = draft_warmth;
    args.top_k = parameters.top_k;
    args.top_p = parameters.top_p;
    args.min_p = parameters.min_p;
    args.target_lse = data<double>(target_lse);
    args.draft_lse = data<double>(draft_lse);
    args.mode = mode_of(mode);
    args.typical_threshold = typical_threshold;
    args.typical_alpha = typical_alpha;
    args.tokens = tokens.mutable_data_ptr<int64_t>();
    args.num_accepted = accepted.mutable_data_ptr<int64_t>();
    args.logprobs = out<cpu::Wide<T>>(logprobs);
    args.status = status.mutable_data_ptr<int64_t>();
    run(args, args.mode == cpu::AcceptMode::kMatch && !filtered);
  });
  return {tokens, accepted, logprobs, status};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "speculative_accept(Tensor target_logits, Tensor draft_token_ids, Tensor key, "
      "Tensor? draft_logits, Tensor? num_drafts, Tensor? cu_num_logits, Tensor temperature, "
      "Tensor? draft_temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? bitmask, "
      "str mode, float typical_threshold, float typical_alpha, Tensor? draft_logsumexp, "
      "Tensor? target_logsumexp, Tensor? draft_to_target, Tensor? positions) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) { m.impl(kOp, speculative_accept_cpu); }

}  // namespace randfuse
