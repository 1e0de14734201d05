// categorical_sample, categorical_sample_with_stats, categorical_race: schema, checks, allocation,
// threads.
#include "../kernels/cpu/categorical_sample.h"

#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "sampling.h"

#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/categorical_sample.h"
#include "cuda.h"
#endif

namespace randfuse {
namespace {

struct Arguments {
  const Tensor &logits, &key, &temperature;
  const OptionalTensor &top_k, &top_p, &min_p, &exclude, &bitmask, &uncond_logits, &rows;
  double cfg_scale;
  std::optional<int64_t> num_samples;
  c10::string_view method;
  int64_t row_offset, col_offset;
};

enum class Wanted { kTokens, kStatistics, kScores };

// A list of ids on the device of the logits, in [0, limit) where they can be read.
Tensor checked_ids(const char* op, const char* name, const Tensor& ids, at::Device device,
                   int64_t limit) {
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong, op, ": ", name, " must be int64, got ",
                   dtype_name(ids));
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.device() == device, op, ": ", name,
                    " must have one dimension and be on ", device, ", got ", ids.sizes(), " on ",
                    ids.device());
  const Tensor own = ids.contiguous();
  const int64_t* v = own.const_data_ptr<int64_t>();
  for (int64_t i = 0; ids.is_cpu() && i < own.numel(); ++i)
    TORCH_CHECK_VALUE(0 <= v[i] && v[i] < limit, op, ": ", name, " must be in [0, ", limit,
                      "), got ", v[i]);
  return own;
}

// What both devices check and need; undefined tensors were not given.
struct Checked {
  Rows shape;
  KeyedStream stream;
  Tensor uncond, bitmask, exclude, rows;
  int64_t words, draws, count;  // words of a row's bitmask, draws a row, rows of the result
  bool race;

  Checked(const char* op, const Arguments& a, Wanted wanted)
      : shape(rows_of(a.logits)),
        words((shape.cols + 31) / 32),
        draws(a.num_samples.value_or(1)),
        count(shape.rows),
        race(a.method == "race") {
    check_float(op, "logits", a.logits);
    TORCH_CHECK_VALUE(a.logits.dim() >= 1 && 1 <= shape.cols && shape.cols <= kMaxVocab, op,
                      ": logits must have shape (…, V) with V in [1, 2**20], got ",
                      a.logits.sizes());
    TORCH_CHECK_VALUE(race || a.method == "cdf", op, ": method must be 'cdf' or 'race', got '",
                      a.method, "'");
    TORCH_CHECK_VALUE(draws >= 1 && draws < int64_t{1} << 32, op,
                      ": num_samples must be in [1, 2**32), got ", draws);
    TORCH_CHECK_VALUE(std::isfinite(a.cfg_scale), op, ": cfg_scale must be finite, got ",
                      a.cfg_scale);
    const at::Device device = a.logits.device();
    stream = mask_stream(op, a.key, device, shape.rows, shape.cols,
                         static_cast<int64_t>(Op::kCategorical), 0, a.row_offset, 0);
    TORCH_CHECK_VALUE(a.col_offset % 4 == 0 && 0 <= a.col_offset &&
                          a.col_offset <= (int64_t{1} << 34) - shape.cols,
                      op, ": col_offset must be a multiple of 4 in [0, 2**34 - V], got ",
                      a.col_offset);
    if (a.uncond_logits.has_value()) {
      uncond = *a.uncond_logits;
      check_like(op, "uncond_logits", uncond, a.logits);
      TORCH_CHECK_VALUE(uncond.sizes() == a.logits.sizes(), op, ": uncond_logits must have shape ",
                        a.logits.sizes(), ", got ", uncond.sizes());
    }
    if (a.bitmask.has_value()) {
      TORCH_CHECK_TYPE(a.bitmask->scalar_type() == at::kInt, op, ": bitmask must be int32, got ",
                       dtype_name(*a.bitmask));
      TORCH_CHECK_VALUE(a.bitmask->device() == device && a.bitmask->dim() == 2 &&
                            a.bitmask->size(0) == shape.rows && a.bitmask->size(1) == words,
                        op, ": bitmask must have shape (rows, ceil(V / 32)) = (", shape.rows, ", ",
                        words, ") on ", device, ", got ", a.bitmask->sizes(), " on ",
                        a.bitmask->device());
      bitmask = a.bitmask->contiguous();
    }
    if (a.exclude.has_value())
      exclude = checked_ids(op, "exclude", *a.exclude, device,
                            wanted == Wanted::kScores ? int64_t{1} << 34 : shape.cols);
    if (a.rows.has_value()) {
      rows = checked_ids(op, "rows", *a.rows, device, shape.rows);
      count = rows.numel();
    }
  }
};

template <class V>
const V* given(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<V>() : nullptr;
}

struct Outputs {
  Tensor tokens, score;
  Tensor logprob, log_odds, margin, entropy, logsumexp;

  Outputs(const Arguments& a, const Checked& c, Wanted wanted) {
    std::vector<int64_t> per_row =
        c.rows.defined()
            ? c.rows.sizes().vec()
            : std::vector<int64_t>(a.logits.sizes().begin(), a.logits.sizes().end() - 1);
    std::vector<int64_t> per_draw = per_row;
    if (a.num_samples.has_value()) per_draw.push_back(c.draws);
    tokens = at::empty(per_draw, a.logits.options().dtype(at::kLong));
    if (wanted == Wanted::kScores)
      score = at::empty(per_draw, a.logits.options().dtype(at::kDouble));
    if (wanted != Wanted::kStatistics) return;
    const auto like =
        a.logits.options().dtype(a.logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    for (Tensor* t : {&logprob, &log_odds}) *t = at::empty(per_draw, like);
    for (Tensor* t : {&margin, &entropy, &logsumexp}) *t = at::empty(per_row, like);
  }
};

// What the arguments of both devices call alike.
template <class Args, class Parameters>
void fill(Args& args, const Arguments& a, const Checked& c, const Parameters& parameters,
          const Outputs& y) {
  using Real = std::remove_pointer_t<decltype(args.logprob)>;
  const auto stat = [](const Tensor& t) { return t.defined() ? out<Real>(t) : nullptr; };
  args.logits.vocab = c.shape.cols;
  args.logits.scale_plus_one = static_cast<decltype(args.logits.scale_plus_one)>(a.cfg_scale + 1.0);
  args.logits.num_exclude = c.exclude.defined() ? c.exclude.numel() : 0;
  args.logits.bitmask = given<int32_t>(c.bitmask);
  args.logits.bitmask_words = c.words;
  args.logits.col_offset = a.col_offset;
  args.keys = c.stream.keys;
  args.rows_per_key = c.stream.rows_per_key;
  args.row_offset = c.stream.row_offset;
  args.temperature = parameters.temperature;
  args.top_k = parameters.top_k;
  args.top_p = parameters.top_p;
  args.min_p = parameters.min_p;
  args.num_samples = c.draws;
  args.race = c.race;
  args.tokens = y.tokens.mutable_data_ptr<int64_t>();
  args.score = y.score.defined() ? y.score.mutable_data_ptr<double>() : nullptr;
  args.logprob = stat(y.logprob);
  args.log_odds = stat(y.log_odds);
  args.margin = stat(y.margin);
  args.entropy = stat(y.entropy);
  args.logsumexp = stat(y.logsumexp);
}

Outputs run_cpu(const char* op, const Arguments& a, Wanted wanted) {
  const Checked c(op, a, wanted);
  const SamplingParameters parameters(op, c.shape.rows, a.temperature, a.top_k, a.top_p, a.min_p);
  const Tensor logits = with_row_layout(a.logits);
  const Tensor uncond = c.uncond.defined() ? with_row_layout(c.uncond) : Tensor();
  const Tensor exclude = c.exclude.defined() ? std::get<0>(at::sort(c.exclude)) : Tensor();
  const Outputs y(a, c, wanted);
  dispatch_float(a.logits, [&](auto type) {
    using T = decltype(type);
    cpu::CategoricalArgs<T> args{};
    args.logits.logits = in<T>(logits);
    args.logits.layout = row_layout(logits);
    if (uncond.defined()) {
      args.logits.uncond = in<T>(uncond);
      args.logits.uncond_layout = row_layout(uncond);
    }
    args.logits.exclude = given<int64_t>(exclude);
    args.rows = given<int64_t>(c.rows);
    fill(args, a, c, parameters, y);
    // Rows a task: some 65536 tokens, 10 us of work.
    parallel_groups(
        c.count, [&](int64_t begin, int64_t end) { cpu::categorical_sample<T>(args, begin, end); },
        std::max<int64_t>(1, 65536 / c.shape.cols));
  });
  return y;
}

#ifdef RANDFUSE_CUDA

Outputs run_cuda(const char* op, const Arguments& a, Wanted wanted) {
  const Checked c(op, a, wanted);
  const CudaScope scope(a.logits);
  const CudaSamplingParameters parameters(op, c.shape.rows, a.logits.device(), a.temperature,
                                          a.top_k, a.top_p, a.min_p);
  const Tensor logits = matrix_of(a.logits);
  const Tensor uncond = c.uncond.defined() ? matrix_of(c.uncond) : Tensor();
  const Outputs y(a, c, wanted);
  dispatch_cuda_float(a.logits, [&](auto type) {
    using T = decltype(type);
    cuda::CategoricalArgs<T> args{};
    args.logits.logits = in<T>(logits);
    args.logits.stride = row_stride(logits);
    args.logits.rows = c.shape.rows;
    if (uncond.defined()) {
      args.logits.uncond = in<T>(uncond);
      args.logits.uncond_stride = row_stride(uncond);
    }
    args.logits.exclude = given<int64_t>(c.exclude);
    args.chosen = given<int64_t>(c.rows);
    args.count = c.count;
    args.filters = a.top_k.has_value() || a.top_p.has_value() || a.min_p.has_value();
    fill(args, a, c, parameters, y);
    const int64_t bytes = static_cast<int64_t>(cuda::categorical_workspace(args));
    const Tensor workspace = at::empty({bytes}, a.logits.options().dtype(at::kByte));
    C10_CUDA_CHECK(cuda::launch_categorical_sample(args, workspace.mutable_data_ptr(), scope));
  });
  return y;
}

#endif  // RANDFUSE_CUDA

Outputs run(const char* op, const Arguments& a, Wanted wanted) {
#ifdef RANDFUSE_CUDA
  if (a.logits.is_cuda()) return run_cuda(op, a, wanted);
#endif
  return run_cpu(op, a, wanted);
}

Tensor categorical_sample(const Tensor& logits, const Tensor& key, const Tensor& temperature,
                          const OptionalTensor& top_k, const OptionalTensor& top_p,
                          const OptionalTensor& min_p, const OptionalTensor& exclude,
                          const OptionalTensor& bitmask, const OptionalTensor& uncond_logits,
                          double cfg_scale, const OptionalTensor& rows,
                          std::optional<int64_t> num_samples, c10::string_view method,
                          int64_t row_offset) {
  return run("categorical_sample",
             {logits, key, temperature, top_k, top_p, min_p, exclude, bitmask, uncond_logits, rows,
              cfg_scale, num_samples, method, row_offset, 0},
             Wanted::kTokens)
      .tokens;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> categorical_sample_with_stats(
    const Tensor& logits, const Tensor& key, const Tensor& temperature, const OptionalTensor& top_k,
    const OptionalTensor& top_p, const OptionalTensor& min_p, const OptionalTensor& exclude,
    const OptionalTensor& bitmask, const OptionalTensor& uncond_logits, double cfg_scale,
    const OptionalTensor& rows, std::optional<int64_t> num_samples, c10::string_view method,
    int64_t row_offset) {
  const Outputs y = run("categorical_sample_with_stats",
                        {logits, key, temperature, top_k, top_p, min_p, exclude, bitmask,
                         uncond_logits, rows, cfg_scale, num_samples, method, row_offset, 0},
                        Wanted::kStatistics);
  return {y.tokens, y.logprob, y.log_odds, y.margin, y.entropy, y.logsumexp};
}

std::tuple<Tensor, Tensor> categorical_race(
    const Tensor& logits, const Tensor& key, const Tensor& temperature,
    const OptionalTensor& exclude, const OptionalTensor& bitmask,
    const OptionalTensor& uncond_logits, double cfg_scale, const OptionalTensor& rows,
    std::optional<int64_t> num_samples, int64_t row_offset, int64_t col_offset) {
  const OptionalTensor none;
  const Outputs y =
      run("categorical_race",
          {logits, key, temperature, none, none, none, exclude, bitmask, uncond_logits, rows,
           cfg_scale, num_samples, "race", row_offset, col_offset},
          Wanted::kScores);
  return {y.tokens, y.score};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "categorical_sample(Tensor logits, Tensor key, Tensor temperature, Tensor? top_k, "
      "Tensor? top_p, Tensor? min_p, Tensor? exclude, Tensor? bitmask, Tensor? uncond_logits, "
      "float cfg_scale, Tensor? rows, int? num_samples, str method, SymInt row_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "categorical_sample_with_stats(Tensor logits, Tensor key, Tensor temperature, "
      "Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? exclude, Tensor? bitmask, "
      "Tensor? uncond_logits, float cfg_scale, Tensor? rows, int? num_samples, str method, "
      "SymInt row_offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "categorical_race(Tensor logits, Tensor key, Tensor temperature, Tensor? exclude, "
      "Tensor? bitmask, Tensor? uncond_logits, float cfg_scale, Tensor? rows, int? num_samples, "
      "SymInt row_offset, SymInt col_offset) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("categorical_sample", categorical_sample);
  m.impl("categorical_sample_with_stats", categorical_sample_with_stats);
  m.impl("categorical_race", categorical_race);
}

#ifdef RANDFUSE_CUDA
TORCH_LIBRARY_IMPL(randfuse, CUDA, m) {
  m.impl("categorical_sample", categorical_sample);
  m.impl("categorical_sample_with_stats", categorical_sample_with_stats);
  m.impl("categorical_race", categorical_race);
}
#endif

}  // namespace randfuse
