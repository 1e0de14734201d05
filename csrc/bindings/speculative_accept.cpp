// speculative_accept: schema, checks, allocation, threads.
#include "../kernels/cpu/speculative_accept.h"

#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "sampling.h"

#ifdef RANDFUSE_CUDA
#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>

#include "../kernels/cuda/speculative_accept.h"
#include "cuda.h"
#endif

namespace randfuse {
namespace {

constexpr const char* kOp = "speculative_accept";
constexpr const char* kWarm = "0 or in [2**-100, 2**100]";  // of temperatures

template <class Mode>  // of either device
Mode mode_of(c10::string_view name) {
  if (name == "token") return Mode::kToken;
  if (name == "block") return Mode::kBlock;
  if (name == "match") return Mode::kMatch;
  TORCH_CHECK_VALUE(name == "typical", kOp,
                    ": mode must be 'token', 'block', 'match' or 'typical', got '", name, "'");
  return Mode::kTypical;
}

// An integer tensor as contiguous int64.
Tensor integers(const char* name, const Tensor& x, at::IntArrayRef shape, at::Device device) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, kOp, ": ", name, " must be int64, got ",
                   dtype_name(x));
  TORCH_CHECK_VALUE(x.device() == device && x.sizes() == shape, kOp, ": ", name,
                    " must have shape ", shape, " on ", device, ", got ", x.sizes(), " on ",
                    x.device());
  return x.contiguous();
}

// Log-sum-exps of rows as contiguous float64.
Tensor saved(const char* name, const OptionalTensor& x, at::IntArrayRef shape, at::Device device) {
  if (!x.has_value()) return {};
  TORCH_CHECK_TYPE(x->is_floating_point(), kOp, ": ", name, " must be floating, got ",
                   dtype_name(*x));
  TORCH_CHECK_VALUE(x->device() == device && x->sizes() == shape, kOp, ": ", name,
                    " must have shape ", shape, " on ", device, ", got ", x->sizes(), " on ",
                    x->device());
  return x->to(at::kDouble).contiguous();
}

// Columns of the draft's rows in order of the tokens that they mean.
struct Columns {
  Tensor token, column;

  Columns(const Tensor& map, int64_t vocab) {
    const Tensor given = integers("draft_to_target", map, map.sizes(), map.device());
    TORCH_CHECK_VALUE(map.dim() == 1, kOp, ": draft_to_target must have one dimension, got ",
                      map.sizes());
    const int64_t* v = given.const_data_ptr<int64_t>();
    for (int64_t k = 0; map.is_cpu() && k < given.numel(); ++k)
      TORCH_CHECK_VALUE(0 <= v[k] && v[k] < vocab, kOp, ": draft_to_target must be in [0, ", vocab,
                        "), got ", v[k]);
    std::tie(token, column) = at::sort(given, /*stable=*/true, 0, /*descending=*/false);
  }
};

// Where each request's rows begin; every number of drafts that follows from it is in [0, K], where
// that can be read.
Tensor checked_rows(const Tensor& cu, int64_t requests, int64_t drafts, int64_t rows,
                    at::Device device) {
  const Tensor own = integers("cu_num_logits", cu, {requests + 1}, device);
  if (!own.is_cpu()) return own;
  const int64_t* v = own.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(v[0] >= 0 && v[requests] <= rows, kOp, ": cu_num_logits must be in [0, ", rows,
                    "], the rows of target_logits, got ", v[0], " … ", v[requests]);
  for (int64_t b = 0; b < requests; ++b)
    TORCH_CHECK_VALUE(v[b] <= v[b + 1] && v[b + 1] <= v[b] + drafts + 1, kOp,
                      ": cu_num_logits must rise by 0 … K + 1 = ", drafts + 1, " a request, got ",
                      v[b + 1] - v[b]);
  return own;
}

Tensor checked_drafts(const Tensor& num_drafts, int64_t requests, int64_t drafts,
                      at::Device device) {
  const Tensor own = integers("num_drafts", num_drafts, {requests}, device);
  const int64_t* v = own.const_data_ptr<int64_t>();
  for (int64_t b = 0; own.is_cpu() && b < requests; ++b)
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

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Arguments {
  const Tensor &target_logits, &draft_token_ids, &key;
  const OptionalTensor &draft_logits, &num_drafts, &cu_num_logits;
  const Tensor& temperature;
  const OptionalTensor &draft_temperature, &top_k, &top_p, &min_p, &bitmask;
  c10::string_view mode;
  double typical_threshold, typical_alpha;
  const OptionalTensor &draft_logsumexp, &target_logsumexp, &draft_to_target, &positions;
};

// What both devices check and need; undefined tensors were not given.
struct Checked {
  const Arguments& a;
  int64_t requests, drafts, words;  // words of a row's bitmask
  Rows shape;
  bool filtered;
  KeyedStream stream;
  Tensor tokens_in, mask, cu, counts, places, target_lse, draft_lse;
  Tensor tokens, accepted, logprobs, status;
  std::optional<Columns> columns;

  explicit Checked(const Arguments& arguments)
      : a(arguments),
        shape(rows_of(a.target_logits)),
        filtered(a.top_k.has_value() || a.top_p.has_value() || a.min_p.has_value()) {
    const Tensor& logits = a.target_logits;
    const at::Device device = logits.device();
    check_float(kOp, "target_logits", logits);
    TORCH_CHECK_VALUE(a.draft_token_ids.dim() == 2, kOp,
                      ": draft_token_ids must have shape (B, K), got ", a.draft_token_ids.sizes());
    requests = a.draft_token_ids.size(0), drafts = a.draft_token_ids.size(1);
    tokens_in = integers("draft_token_ids", a.draft_token_ids, {requests, drafts}, device);
    const bool packed = a.cu_num_logits.has_value();
    TORCH_CHECK_VALUE(
        logits.dim() == (packed ? 2 : 3) &&
            (packed || (logits.size(0) == requests && logits.size(1) == drafts + 1)),
        kOp, ": target_logits must have shape (B, K + 1, V), or (rows, V) with cu_num_logits, got ",
        logits.sizes());
    TORCH_CHECK_VALUE(!packed || !a.num_drafts.has_value(), kOp,
                      ": num_drafts must be None with cu_num_logits, got both");
    TORCH_CHECK_VALUE(1 <= shape.cols && shape.cols <= kMaxVocab, kOp,
                      ": target_logits must have V in [1, 2**20], got ", logits.sizes());
    stream = mask_stream(kOp, a.key, device, requests, shape.cols,
                         static_cast<int64_t>(Op::kAcceptCoin), 0, 0, 0);
    TORCH_CHECK_VALUE(!filtered || !a.target_logsumexp.has_value(), kOp,
                      ": target_logsumexp must be None with top_k, top_p or min_p, got both");
    check_draft(device);
    const at::IntArrayRef per_row = logits.sizes().slice(0, logits.dim() - 1);
    words = (shape.cols + 31) / 32;
    if (a.bitmask.has_value()) {
      std::vector<int64_t> expected = per_row.vec();
      expected.push_back(words);
      TORCH_CHECK_TYPE(a.bitmask->scalar_type() == at::kInt, kOp, ": bitmask must be int32, got ",
                       dtype_name(*a.bitmask));
      TORCH_CHECK_VALUE(a.bitmask->device() == device && a.bitmask->sizes() == expected, kOp,
                        ": bitmask must have shape ", expected, " on ", device, ", got ",
                        a.bitmask->sizes(), " on ", a.bitmask->device());
      mask = a.bitmask->contiguous();
    }
    if (packed) cu = checked_rows(*a.cu_num_logits, requests, drafts, shape.rows, device);
    if (a.num_drafts.has_value()) counts = checked_drafts(*a.num_drafts, requests, drafts, device);
    if (a.positions.has_value()) places = integers("positions", *a.positions, {requests}, device);
    target_lse = saved("target_logsumexp", a.target_logsumexp, per_row, device);
    draft_lse = saved("draft_logsumexp", a.draft_logsumexp, {requests, drafts}, device);
    const auto like = logits.options();
    tokens = at::empty({requests, drafts + 1}, like.dtype(at::kLong));
    accepted = at::empty({requests}, like.dtype(at::kLong));
    status = at::empty({requests}, like.dtype(at::kLong));
    const bool wide = logits.scalar_type() == at::kDouble;
    logprobs = at::empty({requests, drafts + 1}, like.dtype(wide ? at::kDouble : at::kFloat));
  }

  // What the arguments of both devices call alike.
  template <class Args, class Real>
  void fill(Args& args, Real* log_p) const {
    args.target.vocab = args.draft.vocab = shape.cols;
    args.target.bitmask = data<int32_t>(mask);
    args.target.bitmask_words = words;
    args.requests = requests;
    args.drafts = drafts;
    args.cu_rows = data<int64_t>(cu);
    args.num_drafts = data<int64_t>(counts);
    args.tokens_in = data<int64_t>(tokens_in);
    args.keys = stream.keys;
    args.requests_per_key = stream.rows_per_key;
    args.positions = data<int64_t>(places);
    args.target_lse = data<double>(target_lse);
    args.draft_lse = data<double>(draft_lse);
    args.mode = mode_of<decltype(args.mode)>(a.mode);
    args.typical_threshold = a.typical_threshold;
    args.typical_alpha = a.typical_alpha;
    args.tokens = tokens.mutable_data_ptr<int64_t>();
    args.num_accepted = accepted.mutable_data_ptr<int64_t>();
    args.logprobs = log_p;
    args.status = status.mutable_data_ptr<int64_t>();
  }
  Outputs outputs() const { return {tokens, accepted, logprobs, status}; }

 private:
  void check_draft(at::Device device) {
    TORCH_CHECK_VALUE(a.draft_logits.has_value() || !a.draft_to_target.has_value(), kOp,
                      ": draft_to_target must be None without draft_logits, got a Tensor");
    if (!a.draft_logits.has_value()) return;
    if (a.draft_to_target.has_value()) {
      TORCH_CHECK_VALUE(a.draft_to_target->device() == device, kOp, ": draft_to_target must be on ",
                        device, ", got ", a.draft_to_target->device());
      columns.emplace(*a.draft_to_target, shape.cols);
    }
    check_like(kOp, "draft_logits", *a.draft_logits, a.target_logits);
    const int64_t width = columns ? columns->token.numel() : shape.cols;
    TORCH_CHECK_VALUE(a.draft_logits->sizes() == at::IntArrayRef({requests, drafts, width}), kOp,
                      ": draft_logits must have shape (B, K, V) = (", requests, ", ", drafts, ", ",
                      width, "), got ", a.draft_logits->sizes());
  }
};

Outputs run_cpu(const Arguments& a) {
  const Checked c(a);
  const SamplingParameters parameters(kOp, c.requests, a.temperature, a.top_k, a.top_p, a.min_p);
  const RowParameter<double> draft_warmth(kOp, "draft_temperature", a.draft_temperature, c.requests,
                                          kWarm, SamplingParameters::warm);
  const Tensor target = with_row_layout(a.target_logits);
  const Tensor draft = a.draft_logits.has_value() ? with_row_layout(*a.draft_logits) : Tensor();
  dispatch_float(target, [&](auto type) {
    using T = decltype(type);
    cpu::AcceptArgs<T> args{};
    c.fill(args, out<cpu::Wide<T>>(c.logprobs));
    args.target.logits = in<T>(target);
    args.target.layout = row_layout(target);
    if (draft.defined()) {
      args.draft.logits = in<T>(draft);
      args.draft.layout = row_layout(draft);
    }
    if (c.columns) {
      args.draft.token = data<int64_t>(c.columns->token);
      args.draft.column = data<int64_t>(c.columns->column);
      args.draft.num_columns = c.columns->token.numel();
    }
    args.temperature = parameters.temperature;
    args.draft_temperature = draft_warmth;
    args.top_k = parameters.top_k;
    args.top_p = parameters.top_p;
    args.min_p = parameters.min_p;
    run(args, args.mode == cpu::AcceptMode::kMatch && !c.filtered);
  });
  return c.outputs();
}

#ifdef RANDFUSE_CUDA

Outputs run_cuda(const Arguments& a) {
  const CudaScope scope(a.target_logits);
  const Checked c(a);
  const at::Device device = a.target_logits.device();
  const CudaSamplingParameters parameters(kOp, c.requests, device, a.temperature, a.top_k, a.top_p,
                                          a.min_p);
  const CudaRowParameter<double> draft_warmth(kOp, "draft_temperature", a.draft_temperature,
                                              c.requests, device, NAN, kWarm,
                                              SamplingParameters::warm);
  const Tensor target = with_row_layout(a.target_logits);
  const Tensor draft = a.draft_logits.has_value() ? with_row_layout(*a.draft_logits) : Tensor();
  const auto whole = a.target_logits.options().dtype(at::kLong);
  const Tensor starts =
      c.columns ? at::searchsorted(c.columns->token, at::arange(c.shape.cols + 1, whole))
                : Tensor();
  dispatch_cuda_float(target, [&](auto type) {
    using T = decltype(type);
    cuda::AcceptArgs<T> args{};
    c.fill(args, out<float>(c.logprobs));
    args.target.logits = in<T>(target);
    args.target.stride = target.stride(-2);
    args.target_step = target.stride(0);
    args.target.rows = c.shape.rows;
    if (draft.defined()) {
      args.draft.logits = in<T>(draft);
      args.draft.stride = draft.stride(-2);
      args.draft_step = draft.stride(0);
    }
    if (c.columns) args.columns = {data<int64_t>(starts), data<int64_t>(c.columns->column)};
    args.temperature = parameters.temperature;
    args.draft_temperature = draft_warmth;
    args.top_k = parameters.top_k;
    args.top_p = parameters.top_p;
    args.min_p = parameters.min_p;
    args.filters = c.filtered;
    bool wanted = false;
    C10_CUDA_CHECK(cuda::accept_wants_words(args, &wanted));
    const Tensor words =
        wanted ? at::zeros({c.requests, c.drafts + 2}, whole.dtype(at::kInt)) : Tensor();
    args.words = wanted ? out<uint32_t>(words) : nullptr;
    const int64_t bytes = static_cast<int64_t>(cuda::accept_workspace(args));
    const Tensor workspace = at::empty({bytes}, whole.dtype(at::kByte));
    C10_CUDA_CHECK(cuda::launch_speculative_accept(args, workspace.mutable_data_ptr(), scope));
  });
  return c.outputs();
}

#endif  // RANDFUSE_CUDA

Outputs speculative_accept(const Tensor& target_logits, const Tensor& draft_token_ids,
                           const Tensor& key, const OptionalTensor& draft_logits,
                           const OptionalTensor& num_drafts, const OptionalTensor& cu_num_logits,
                           const Tensor& temperature, const OptionalTensor& draft_temperature,
                           const OptionalTensor& top_k, const OptionalTensor& top_p,
                           const OptionalTensor& min_p, const OptionalTensor& bitmask,
                           c10::string_view mode, double typical_threshold, double typical_alpha,
                           const OptionalTensor& draft_logsumexp,
                           const OptionalTensor& target_logsumexp,
                           const OptionalTensor& draft_to_target, const OptionalTensor& positions) {
  const Arguments a{target_logits,
                    draft_token_ids,
                    key,
                    draft_logits,
                    num_drafts,
                    cu_num_logits,
                    temperature,
                    draft_temperature,
                    top_k,
                    top_p,
                    min_p,
                    bitmask,
                    mode,
                    typical_threshold,
                    typical_alpha,
                    draft_logsumexp,
                    target_logsumexp,
                    draft_to_target,
                    positions};
#ifdef RANDFUSE_CUDA
  if (target_logits.is_cuda()) return run_cuda(a);
#endif
  return run_cpu(a);
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

TORCH_LIBRARY_IMPL(randfuse, CPU, m) { m.impl(kOp, speculative_accept); }
#ifdef RANDFUSE_CUDA
TORCH_LIBRARY_IMPL(randfuse, CUDA, m) { m.impl(kOp, speculative_accept); }
#endif

}  // namespace randfuse
