// categorical_sample, categorical_sample_with_stats, categorical_race: schema, checks, allocation,
// threads.
#include "../kernels/cpu/categorical_sample.h"

#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "sampling.h"

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

// A list of ids in [0, limit) as int64.
Tensor checked_ids(const char* op, const char* name, const Tensor& ids, int64_t limit) {
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong, op, ": ", name, " must be int64, got ",
                   dtype_name(ids));
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.is_cpu(), op, ": ", name,
                    " must have one dimension and be on cpu, got ", ids.sizes(), " on ",
                    ids.device());
  const Tensor own = ids.contiguous();
  const int64_t* v = own.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < own.numel(); ++i)
    TORCH_CHECK_VALUE(0 <= v[i] && v[i] < limit, op, ": ", name, " must be in [0, ", limit,
                      "), got ", v[i]);
  return own;
}

struct Outputs {
  Tensor tokens, score;
  Tensor logprob, log_odds, margin, entropy, logsumexp;
};

Outputs run_cpu(const char* op, const Arguments& a, Wanted wanted) {
  check_float(op, "logits", a.logits);
  const Rows shape = rows_of(a.logits);
  TORCH_CHECK_VALUE(a.logits.dim() >= 1 && 1 <= shape.cols && shape.cols <= kMaxVocab, op,
                    ": logits must have shape (…, V) with V in [1, 2**20], got ", a.logits.sizes());
  TORCH_CHECK_VALUE(a.method == "cdf" || a.method == "race", op,
                    ": method must be 'cdf' or 'race', got '", a.method, "'");
  TORCH_CHECK_VALUE(a.num_samples.value_or(1) >= 1 && a.num_samples.value_or(1) < int64_t{1} << 32,
                    op, ": num_samples must be in [1, 2**32), got ", a.num_samples.value_or(1));
  TORCH_CHECK_VALUE(std::isfinite(a.cfg_scale), op, ": cfg_scale must be finite, got ",
                    a.cfg_scale);
  const KeyedStream stream =
      mask_stream(op, a.key, a.logits.device(), shape.rows, shape.cols,
                  static_cast<int64_t>(Op::kCategorical), 0, a.row_offset, 0);
  TORCH_CHECK_VALUE(
      a.col_offset % 4 == 0 && 0 <= a.col_offset && a.col_offset <= (int64_t{1} << 34) - shape.cols,
      op, ": col_offset must be a multiple of 4 in [0, 2**34 - V], got ", a.col_offset);

  const SamplingParameters parameters(op, shape.rows, a.temperature, a.top_k, a.top_p, a.min_p);

  const Tensor logits = with_row_layout(a.logits);
  Tensor uncond, bitmask, exclude, rows;
  if (a.uncond_logits.has_value()) {
    check_like(op, "uncond_logits", *a.uncond_logits, a.logits);
    TORCH_CHECK_VALUE(a.uncond_logits->sizes() == a.logits.sizes(), op,
                      ": uncond_logits must have shape ", a.logits.sizes(), ", got ",
                      a.uncond_logits->sizes());
    uncond = with_row_layout(*a.uncond_logits);
  }
  const int64_t words = (shape.cols + 31) / 32;
  if (a.bitmask.has_value()) {
    TORCH_CHECK_TYPE(a.bitmask->scalar_type() == at::kInt, op, ": bitmask must be int32, got ",
                     dtype_name(*a.bitmask));
    TORCH_CHECK_VALUE(a.bitmask->is_cpu() && a.bitmask->dim() == 2 &&
                          a.bitmask->size(0) == shape.rows && a.bitmask->size(1) == words,
                      op, ": bitmask must have shape (rows, ceil(V / 32)) = (", shape.rows, ", ",
                      words, ") on cpu, got ", a.bitmask->sizes(), " on ", a.bitmask->device());
    bitmask = a.bitmask->contiguous();
  }
  if (a.exclude.has_value())
    exclude = std::get<0>(at::sort(checked_ids(
        op, "exclude", *a.exclude, wanted == Wanted::kScores ? int64_t{1} << 34 : shape.cols)));
  if (a.rows.has_value()) rows = checked_ids(op, "rows", *a.rows, shape.rows);

  const int64_t draws = a.num_samples.value_or(1);
  std::vector<int64_t> per_row =
      rows.defined() ? rows.sizes().vec()
                     : std::vector<int64_t>(a.logits.sizes().begin(), a.logits.sizes().end() - 1);
  std::vector<int64_t> per_draw = per_row;
  if (a.num_samples.has_value()) per_draw.push_back(draws);
  Outputs y;
  y.tokens = at::empty(per_draw, a.logits.options().dtype(at::kLong));
  if (wanted == Wanted::kScores)
    y.score = at::empty(per_draw, a.logits.options().dtype(at::kDouble));
  if (wanted == Wanted::kStatistics) {
    const auto like =
        a.logits.options().dtype(a.logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    for (Tensor* t : {&y.logprob, &y.log_odds}) *t = at::empty(per_draw, like);
    for (Tensor* t : {&y.margin, &y.entropy, &y.logsumexp}) *t = at::empty(per_row, like);
  }

  dispatch_float(a.logits, [&](auto type) {
    using T = decltype(type);
    using Z = cpu::Wide<T>;
    const auto stat = [](const Tensor& t) { return t.defined() ? out<Z>(t) : nullptr; };
    const cpu::CategoricalArgs<T> args{
        {in<T>(logits), row_layout(logits), shape.cols, uncond.defined() ? in<T>(uncond) : nullptr,
         uncond.defined() ? row_layout(uncond) : cpu::RowLayout{},
         static_cast<Z>(a.cfg_scale + 1.0),
         exclude.defined() ? exclude.const_data_ptr<int64_t>() : nullptr,
         exclude.defined() ? exclude.numel() : 0,
         bitmask.defined() ? bitmask.const_data_ptr<int32_t>() : nullptr, words, a.col_offset},
        rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr,
        stream.keys,
        stream.rows_per_key,
        stream.row_offset,
        parameters.temperature,
        parameters.top_k,
        parameters.top_p,
        parameters.min_p,
        draws,
        a.method == "race",
        y.tokens.mutable_data_ptr<int64_t>(),
        y.score.defined() ? y.score.mutable_data_ptr<double>() : nullptr,
        stat(y.logprob),
        stat(y.log_odds),
        stat(y.margin),
        stat(y.entropy),
        stat(y.logsumexp)};
    const int64_t total = rows.defined() ? rows.numel() : shape.rows;
    // Rows a task: some 65536 tokens, 10 us of work.
    parallel_groups(
        total, [&](int64_t begin, int64_t end) { cpu::categorical_sample<T>(args, begin, end); },
        std::max<int64_t>(1, 65536 / shape.cols));
  });
  return y;
}

Tensor categorical_sample_cpu(const Tensor& logits, const Tensor& key, const Tensor& temperature,
                              const OptionalTensor& top_k, const OptionalTensor& top_p,
                              const OptionalTensor& min_p, const OptionalTensor& exclude,
                              const OptionalTensor& bitmask, const OptionalTensor& uncond_logits,
                              double cfg_scale, const OptionalTensor& rows,
                              std::optional<int64_t> num_samples, c10::string_view method,
                              int64_t row_offset) {
  return run_cpu("categorical_sample",
                 {logits, key, temperature, top_k, top_p, min_p, exclude, bitmask, uncond_logits,
                  rows, cfg_scale, num_samples, method, row_offset, 0},
                 Wanted::kTokens)
      .tokens;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> categorical_sample_with_stats_cpu(
    const Tensor& logits, const Tensor& key, const Tensor& temperature, const OptionalTensor& top_k,
    const OptionalTensor& top_p, const OptionalTensor& min_p, const OptionalTensor& exclude,
    const OptionalTensor& bitmask, const OptionalTensor& uncond_logits, double cfg_scale,
    const OptionalTensor& rows, std::optional<int64_t> num_samples, c10::string_view method,
    int64_t row_offset) {
  const Outputs y = run_cpu("categorical_sample_with_stats",
                            {logits, key, temperature, top_k, top_p, min_p, exclude, bitmask,
                             uncond_logits, rows, cfg_scale, num_samples, method, row_offset, 0},
                            Wanted::kStatistics);
  return {y.tokens, y.logprob, y.log_odds, y.margin, y.entropy, y.logsumexp};
}

std::tuple<Tensor, Tensor> categorical_race_cpu(
    const Tensor& logits, const Tensor& key, const Tensor& temperature,
    const OptionalTensor& exclude, const OptionalTensor& bitmask,
    const OptionalTensor& uncond_logits, double cfg_scale, const OptionalTensor& rows,
    std::optional<int64_t> num_samples, int64_t row_offset, int64_t col_offset) {
  const OptionalTensor none;
  const Outputs y =
      run_cpu("categorical_race",
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
  m.impl("categorical_sample", categorical_sample_cpu);
  m.impl("categorical_sample_with_stats", categorical_sample_with_stats_cpu);
  m.impl("categorical_race", categorical_race_cpu);
}

}  // namespace randfuse
