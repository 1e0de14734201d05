// multi_sample_cross_entropy and its derivative, in chunks: the logits of some rows and samples,
// then their cross entropy, or their gradient and its two products, or all of it. Nothing is as
// large as M x B x C; the size of a chunk depends on shapes alone, so results do not depend on
// threads.
#include "../kernels/cpu/multi_sample_cross_entropy.h"

#include <ATen/ops/reciprocal.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "dropout_linear.h"
#include "multi_sample_linear.h"

#ifdef RANDFUSE_CUDA
#include <ATen/ops/full.h>

#include "../kernels/cuda/multi_sample_cross_entropy.h"
#include "cuda.h"
#endif

namespace randfuse {
namespace {

constexpr int64_t kNarrowFloats = int64_t{1} << 18;  // logits of a chunk; they stay in the cache
constexpr int64_t kWideFloats = int64_t{1} << 20;    // logits, or dropped rows, of a chunk

struct Chunk {
  int64_t row, rows;
  SampleStream stream;
};

// The arguments of both ops, checked.
struct Problem {
  Tensor x, weight;  // (rows, D), (C, D)
  OptionalTensor bias;
  Tensor target;  // int64 (rows,), or probabilities (rows, C)
  OptionalTensor class_weight;
  KeyedStream stream;
  int64_t samples;
  Rate rate;
  int64_t ignore_index;
  double smoothing;

  int64_t rows() const { return x.size(0); }
  int64_t classes() const { return weight.size(0); }
  bool has_labels() const { return target.scalar_type() == at::kLong; }
};

struct ChunkSize {
  int64_t rows;           // at most
  int64_t floats, a_row;  // of its samples together, and of one row of one sample
};

ChunkSize cpu_chunks(const Problem& p) {
  const bool few = narrow(p.x, p.classes(), p.x.size(1));
  const int64_t width = few ? p.classes() : std::max(p.classes(), p.x.size(1));
  const int64_t floats = few ? kNarrowFloats : kWideFloats;
  const int64_t most = floats / (width * (few ? p.samples : 1));
  return {std::clamp<int64_t>(most, 64, few ? 4096 : 512), floats, width};
}

// Calls body for runs of rows that share a key, or lie in one key's run, and for runs of samples.
template <class Body>
void for_each_chunk(const Problem& p, const ChunkSize& size, const Body& body) {
  const int64_t most = size.rows;
  const int64_t run = p.stream.rows_per_key;
  for (int64_t r = 0; r < p.rows();) {
    const int64_t rows =
        std::min(run <= most ? most / run * run : std::min(most, run - r % run), p.rows() - r);
    MaskStream place = p.stream;
    place.keys += r / run, place.row_offset += r % run;
    const int64_t count = std::clamp<int64_t>(size.floats / (rows * size.a_row), 1, p.samples);
    for (int64_t s = 0; s < p.samples; s += count) {
      body(Chunk{r, rows, {place, s, std::min(count, p.samples - s)}});
    }
    r += rows;
  }
}

// q of probabilities and of smoothed labels: class weight * ((1 - smoothing) * t + smoothing / C).
Tensor target_weights(const Problem& p, const Chunk& chunk) {
  const auto type = sum_type(p.x);
  const double floor = p.smoothing / static_cast<double>(p.classes());
  Tensor q;
  if (!p.has_labels()) {
    q = p.target.narrow(0, chunk.row, chunk.rows).to(type).mul(1 - p.smoothing).add_(floor);
  } else if (p.smoothing > 0) {
    q = at::zeros({p.classes()}, p.x.options().dtype(type)).add_(floor);
  } else {
    return q;
  }
  if (p.class_weight.has_value()) q.mul_(p.class_weight->to(type));
  return q.contiguous();
}

template <class T>
void cross_entropy(const Problem& p, const Chunk& chunk, const Tensor& logits,
                   const Tensor& logsumexp, const Tensor& loss, const Tensor& grad) {
  const Tensor q = target_weights(p, chunk);
  Tensor label_weights;
  if (p.has_labels() && p.class_weight.has_value())
    label_weights = p.class_weight->to(sum_type(p.x)).mul(1 - p.smoothing).contiguous();
  cpu::CrossEntropyArgs<T> a{};
  a.samples = chunk.stream.count, a.rows = chunk.rows, a.classes = p.classes();
  a.logits = out<T>(logits);
  if (q.defined()) a.weights = in<T>(q), a.weights_stride = p.has_labels() ? 0 : p.classes();
  if (p.has_labels()) a.labels = p.target.const_data_ptr<int64_t>() + chunk.row;
  if (label_weights.defined()) a.label_weights = in<T>(label_weights);
  a.label_weight = static_cast<T>(1 - p.smoothing), a.ignore_index = p.ignore_index;
  a.logsumexp = out<T>(logsumexp) + chunk.stream.first * p.rows() + chunk.row;
  a.logsumexp_stride = p.rows(), a.factor = T(1) / static_cast<T>(p.samples);
  if (loss.defined()) a.loss = out<T>(loss) + chunk.row;
  if (grad.defined()) a.grad = in<T>(grad) + chunk.row;
  const int64_t grain = std::max<int64_t>(1, 4096 / (a.classes * a.samples));
  at::parallel_for(0, chunk.rows, grain, [&](int64_t begin, int64_t end) {
    if (!loss.defined()) return cpu::cross_entropy_grad_rows(a, begin, end);
    if (!grad.defined()) return cpu::cross_entropy_rows(a, begin, end);
    for (int64_t r = begin; r < end; ++r) {  // the second pass finds the row in the cache
      cpu::cross_entropy_rows(a, r, r + 1);
      cpu::cross_entropy_grad_rows(a, r, r + 1);
    }
  });
}

// Logits of a chunk, then cross_entropy on them in the type of sums: with loss they give loss and
// logsumexp, with grad they become their gradient. Returns what they have become.
Tensor chunk_logits(const Problem& p, const Chunk& chunk, const Tensor& logsumexp,
                    const Tensor& loss, const Tensor& grad) {
  const Tensor logits = sample_products(p.x.narrow(0, chunk.row, chunk.rows), p.weight, p.bias,
                                        chunk.stream, p.rate, sum_type(p.x));
  if (logits.scalar_type() == at::kDouble) {
    cross_entropy<double>(p, chunk, logits, logsumexp, loss, grad);
  } else {
    cross_entropy<float>(p, chunk, logits, logsumexp, loss, grad);
  }
  return logits;
}

void check_target(const char* op, const Problem& p, const Tensor& x, const Tensor& target) {
  TORCH_CHECK_VALUE(target.device() == x.device(), op, ": target must be on ", x.device(), ", got ",
                    target.device());
  if (target.scalar_type() != at::kLong) {
    TORCH_CHECK_TYPE(target.is_floating_point(), op,
                     ": target must be an int64 or floating Tensor, got ", dtype_name(target));
    const std::vector<int64_t> shape = with_last(x, p.classes());
    TORCH_CHECK_VALUE(target.sizes() == at::IntArrayRef(shape), op,
                      ": target must have shape (…, C) = ", at::IntArrayRef(shape), ", got ",
                      target.sizes());
    TORCH_CHECK_VALUE(p.ignore_index < 0, op,
                      ": ignore_index must be negative for floating targets, got ", p.ignore_index);
    return;
  }
  const at::IntArrayRef shape = x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK_VALUE(target.sizes() == shape, op, ": target must have shape (…) = ", shape, ", got ",
                    target.sizes());
  if (!x.is_cpu()) return;  // reading a class would need a sync: kernels make NaN of a wrong one
  const int64_t* labels = p.target.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < p.rows(); ++r) {
    TORCH_CHECK_VALUE((0 <= labels[r] && labels[r] < p.classes()) || labels[r] == p.ignore_index,
                      op, ": target must be in [0, C=", p.classes(), ") or ignore_index, got ",
                      labels[r]);
  }
}

Problem problem(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                const Tensor& target, const OptionalTensor& ce_weight, const Tensor& key,
                int64_t num_samples, const Rate& rate, int64_t ignore_index, double label_smoothing,
                int64_t row_offset, int64_t col_offset) {
  check_linear(op, x, weight, bias);
  TORCH_CHECK_VALUE(weight.size(0) > 0, op, ": weight must have at least one class, got 0");
  TORCH_CHECK_VALUE(1 <= num_samples && num_samples < int64_t{1} << 32, op,
                    ": num_samples must be in [1, 4294967295], got ", num_samples);
  TORCH_CHECK_VALUE(label_smoothing >= 0.0 && label_smoothing <= 1.0, op,
                    ": label_smoothing must be in [0, 1], got ", label_smoothing);
  if (ce_weight.has_value()) {
    check_float(op, "ce_weight", *ce_weight);
    TORCH_CHECK_VALUE(ce_weight->device() == x.device() && ce_weight->dim() == 1 &&
                          ce_weight->size(0) == weight.size(0),
                      op, ": ce_weight must have shape (C,) = (", weight.size(0), "), got ",
                      ce_weight->sizes());
  }
  const Rows shape = rows_of(x);
  const bool labels = target.scalar_type() == at::kLong;
  Problem result{matrix_of(x),
                 weight,
                 bias,
                 labels ? target.reshape(-1).contiguous() : target.reshape({-1, target.size(-1)}),
                 ce_weight,
                 mask_stream(op, key, x.device(), shape.rows, shape.cols,
                             static_cast<int64_t>(Op::kDropout), 0, row_offset, col_offset),
                 num_samples,
                 rate,
                 ignore_index,
                 label_smoothing};
  check_target(op, result, x, target);
  return result;
}

void check_saved(const char* op, const Tensor& grad, const Tensor& logsumexp, const Tensor& x) {
  TORCH_CHECK_VALUE(logsumexp.dim() >= 1, op, ": logsumexp must have shape (M, …), got ",
                    logsumexp.sizes());
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have at least one dimension, got 0");
  const auto type = sum_type(x);
  TORCH_CHECK_VALUE(
      grad.sizes() == x.sizes().slice(0, x.dim() - 1) && logsumexp.sizes().slice(1) == grad.sizes(),
      op, ": grad and logsumexp must have shapes (…) and (M, …) of x ", x.sizes(), ", got ",
      grad.sizes(), " and ", logsumexp.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == type && logsumexp.scalar_type() == type, op,
                   ": grad and logsumexp must be the type of sums, got ", dtype_name(grad), " and ",
                   dtype_name(logsumexp));
}

std::tuple<Tensor, Tensor> multi_sample_cross_entropy_cpu(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
    const OptionalTensor& ce_weight, const Tensor& key, int64_t num_samples, double p,
    const OptionalTensor& p_tensor, int64_t ignore_index, double label_smoothing,
    int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "multi_sample_cross_entropy";
  const NoAutocast no_autocast;
  const Problem q =
      problem(op, x, weight, bias, target, ce_weight, key, num_samples, cpu_rate(op, p, p_tensor),
              ignore_index, label_smoothing, row_offset, col_offset);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  const Tensor loss = at::zeros(shape, x.options().dtype(sum_type(x)));
  shape.insert(shape.begin(), num_samples);
  const Tensor logsumexp = at::empty(shape, loss.options());
  for_each_chunk(q, cpu_chunks(q),
                 [&](const Chunk& chunk) { chunk_logits(q, chunk, logsumexp, loss, {}); });
  return {loss, logsumexp};
}

// The gradients of the operands, summed over chunks in the type of sums; empty if not wanted.
struct Gradients {
  std::array<bool, 3> wanted;
  Tensor dx, dw, db;

  Gradients(const Problem& p, const std::array<bool, 3>& output_mask) : wanted(output_mask) {
    const auto zeros = [&](int i, at::IntArrayRef shape) {
      return at::zeros(wanted[i] ? shape : at::IntArrayRef{0}, p.x.options().dtype(sum_type(p.x)));
    };
    dx = zeros(0, p.x.sizes()), dw = zeros(1, p.weight.sizes()), db = zeros(2, {p.classes()});
  }

  void add(const Problem& p, const Chunk& chunk, const Tensor& dz) const {
    if (wanted[0])
      add_sample_dgrads(dz, p.weight, chunk.stream, p.rate, dx.narrow(0, chunk.row, chunk.rows));
    if (wanted[1])
      add_sample_wgrads(dz, p.x.narrow(0, chunk.row, chunk.rows), chunk.stream, p.rate, dw);
    if (wanted[2]) db.add_(dz.sum(at::IntArrayRef{0, 1}));
  }

  Tensor dx_like(const Tensor& x) const { return wanted[0] ? dx.view(x.sizes()) : dx; }
};

std::tuple<Tensor, Tensor, Tensor> grad_cpu(const Tensor& grad, const Tensor& logsumexp,
                                            const Tensor& x, const Tensor& weight,
                                            const OptionalTensor& bias, const Tensor& target,
                                            const OptionalTensor& ce_weight, const Tensor& key,
                                            double p, const OptionalTensor& p_tensor,
                                            int64_t ignore_index, double label_smoothing,
                                            int64_t row_offset, int64_t col_offset,
                                            std::array<bool, 3> output_mask) {
  constexpr const char* op = "multi_sample_cross_entropy_grad";
  const NoAutocast no_autocast;
  check_saved(op, grad, logsumexp, x);
  const Problem q =
      problem(op, x, weight, bias, target, ce_weight, key, logsumexp.size(0),
              cpu_rate(op, p, p_tensor), ignore_index, label_smoothing, row_offset, col_offset);
  const Tensor g = grad.contiguous(), lse = logsumexp.contiguous();
  const Gradients sums(q, output_mask);
  for_each_chunk(q, cpu_chunks(q), [&](const Chunk& chunk) {
    sums.add(q, chunk, chunk_logits(q, chunk, lse, {}, g));
  });
  const auto cast = [&](const Tensor& t) { return t.to(x.scalar_type()); };
  return {cast(sums.dx_like(x)), cast(sums.dw), cast(sums.db)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> with_grads_cpu(
    const Tensor& divisor, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& target, const OptionalTensor& ce_weight, const Tensor& key, int64_t num_samples,
    double p, const OptionalTensor& p_tensor, int64_t ignore_index, double label_smoothing,
    int64_t row_offset, int64_t col_offset, std::array<bool, 3> output_mask) {
  constexpr const char* op = "multi_sample_cross_entropy_with_grads";
  const NoAutocast no_autocast;
  const Problem q =
      problem(op, x, weight, bias, target, ce_weight, key, num_samples, cpu_rate(op, p, p_tensor),
              ignore_index, label_smoothing, row_offset, col_offset);
  TORCH_CHECK_VALUE(divisor.dim() == 0 && divisor.scalar_type() == sum_type(x), op,
                    ": divisor must be a 0-d tensor of the type of sums, got ", divisor.sizes(),
                    " ", dtype_name(divisor));
  const Tensor loss = at::zeros({q.rows()}, divisor.options());
  const Tensor logsumexp = at::empty({num_samples, q.rows()}, divisor.options());
  const Tensor grad = at::reciprocal(divisor).expand({q.rows()}).contiguous();
  const Gradients sums(q, output_mask);
  for_each_chunk(q, cpu_chunks(q), [&](const Chunk& chunk) {
    sums.add(q, chunk, chunk_logits(q, chunk, logsumexp, loss, grad));
  });
  return {loss.sum().div_(divisor), sums.dx_like(x), sums.dw, sums.db};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "multi_sample_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? "
      "ce_weight, Tensor key, int num_samples, float p, Tensor? p_tensor, int ignore_index, float "
      "label_smoothing, SymInt row_offset, SymInt col_offset) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "multi_sample_cross_entropy_grad(Tensor grad, Tensor logsumexp, Tensor x, Tensor weight, "
      "Tensor? bias, Tensor target, Tensor? ce_weight, Tensor key, float p, Tensor? p_tensor, int "
      "ignore_index, float label_smoothing, SymInt row_offset, SymInt col_offset, bool[3] "
      "output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "multi_sample_cross_entropy_with_grads(Tensor divisor, Tensor x, Tensor weight, Tensor? "
      "bias, Tensor target, Tensor? ce_weight, Tensor key, int num_samples, float p, Tensor? "
      "p_tensor, int ignore_index, float label_smoothing, SymInt row_offset, SymInt col_offset, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("multi_sample_cross_entropy", multi_sample_cross_entropy_cpu);
  m.impl("multi_sample_cross_entropy_grad", grad_cpu);
  m.impl("multi_sample_cross_entropy_with_grads", with_grads_cpu);
}

#ifdef RANDFUSE_CUDA

namespace {

constexpr int64_t kDeviceFloats = int64_t{1} << 25;  // of a chunk; it fills a device

// The classes that the kernels hold; wider heads, and float32, are the library's: dropped copies,
// products and row operations, chunk by chunk.
bool narrow_head(const Problem& p) { return narrow_cuda(p.x, p.rows(), p.classes(), p.x.size(1)); }

ChunkSize cuda_chunks(const Problem& p) {
  if (narrow_head(p)) {  // all samples of the rows
    const int64_t width = p.classes() * p.samples, floats = std::max(kDeviceFloats, width);
    return {floats / width, floats, p.classes()};
  }
  const int64_t width = std::max(p.classes(), p.x.size(1));
  return {std::max<int64_t>(kDeviceFloats / width, 64), kDeviceFloats, width};
}

OptionalTensor floats(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(x->to(at::kFloat).contiguous()) : x;
}

// out: the gradient of all samples' logits, or nothing and the forward pass; grad of all rows.
void launch_rows(const Problem& p, int64_t row, int64_t rows, const MaskStream& stream,
                 const cuda::RateSource& rate, const Tensor& logsumexp, const Tensor& loss,
                 const Tensor& grad, const Tensor& result) {
  const Tensor weight = matrix_of(p.weight), x = p.x.narrow(0, row, rows);
  const OptionalTensor class_weight = floats(p.class_weight);
  const Tensor bias = p.bias.has_value() ? p.bias->contiguous() : Tensor();
  const Tensor target = p.has_labels() ? p.target : p.target.to(at::kFloat).contiguous();
  dispatch_cuda_float(p.x, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, float>) {  // narrow_head
      cuda::MultiSampleCrossEntropyArgs<T> a{};
      a.head.m = rows, a.head.n = p.classes(), a.head.k = p.x.size(1), a.head.samples = p.samples;
      a.head.x = in<T>(x), a.head.x_stride = row_stride(p.x);
      a.head.weight = in<T>(weight), a.head.weight_stride = row_stride(weight);
      if (bias.defined()) a.head.bias = in<T>(bias);
      a.head.stream = stream, a.head.rate = rate;
      if (p.has_labels()) {
        a.labels = in<int64_t>(target) + row;
      } else {
        a.target = in<float>(target) + row * p.classes();
      }
      if (class_weight.has_value()) a.class_weight = in<float>(*class_weight);
      a.ignore_index = p.ignore_index, a.smoothing = static_cast<float>(p.smoothing);
      a.logsumexp = out<float>(logsumexp);
      const cudaStream_t queue = c10::cuda::getCurrentCUDAStream();
      if (result.defined()) {
        a.head.out = out<T>(result), a.grad = in<float>(grad) + row;
        C10_CUDA_CHECK(cuda::launch_multi_sample_cross_entropy_grad(a, queue));
      } else {
        a.loss = out<float>(loss);
        C10_CUDA_CHECK(cuda::launch_multi_sample_cross_entropy(a, queue));
      }
    }
  });
}

// Target weights (rows, C) of a chunk, NaN in the row of a class that is none.
Tensor all_target_weights(const Problem& p, const Chunk& chunk) {
  const double floor = p.smoothing / static_cast<double>(p.classes());
  const Tensor target = p.target.narrow(0, chunk.row, chunk.rows);
  const auto weighted = [&](const Tensor& q) {
    return p.class_weight.has_value() ? q.mul(p.class_weight->to(at::kFloat)) : q;
  };
  if (!p.has_labels()) return weighted(target.to(at::kFloat).mul(1 - p.smoothing).add_(floor));
  const Tensor label = target.unsqueeze(1), ignored = label.eq(p.ignore_index);
  const Tensor wrong = label.lt(0).logical_or(label.ge(p.classes()));
  const auto options = p.x.options().dtype(at::kFloat);
  const Tensor q = at::full({chunk.rows, p.classes()}, floor, options);
  q.scatter_add_(1, label.clamp(0, p.classes() - 1),
                 at::full({chunk.rows, 1}, 1 - p.smoothing, options));
  return weighted(q).masked_fill_(wrong, NAN).masked_fill_(ignored, 0);
}

// The row operations of wide heads, on the logits (samples, rows, C) of a chunk: the forward pass,
// or, with grad, the gradient in their place.
void library_rows(const Problem& p, const Chunk& chunk, Tensor logits, const Tensor& logsumexp,
                  const Tensor& loss, const Tensor& grad) {
  const Tensor q = all_target_weights(p, chunk);
  const double factor = 1.0 / static_cast<double>(p.samples);
  const Tensor lse =
      logsumexp.narrow(0, chunk.stream.first, chunk.stream.count).narrow(1, chunk.row, chunk.rows);
  if (grad.defined()) {
    const Tensor g = grad.narrow(0, chunk.row, chunk.rows).mul(factor).unsqueeze(-1);
    logits.sub_(lse.unsqueeze(-1)).exp_().mul_(q.sum(-1, true)).sub_(q).mul_(g);
    logits.masked_fill_(q.eq(0).all(-1, true), 0);
  } else {
    lse.copy_(logits.logsumexp(-1));
    const Tensor terms = logits.log_softmax(-1).mul_(q).masked_fill_(q.eq(0), 0);
    loss.narrow(0, chunk.row, chunk.rows).add_(terms.sum(at::IntArrayRef{0, 2}), -factor);
  }
}

Tensor wide_logits(const Problem& p, const Chunk& chunk, const Drop& drop) {
  const Tensor x = p.x.narrow(0, chunk.row, chunk.rows);
  const Tensor y =
      at::empty({chunk.stream.count, chunk.rows, p.classes()}, x.options().dtype(at::kFloat));
  wide_products(x, p.weight, p.bias, chunk.stream, drop, y);
  return y;
}

std::tuple<Tensor, Tensor> multi_sample_cross_entropy_cuda(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
    const OptionalTensor& ce_weight, const Tensor& key, int64_t num_samples, double p,
    const OptionalTensor& p_tensor, int64_t ignore_index, double label_smoothing,
    int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "multi_sample_cross_entropy";
  const Problem q = problem(op, x, weight, bias, target, ce_weight, key, num_samples, {},
                            ignore_index, label_smoothing, row_offset, col_offset);
  const CudaScope scope(x);
  const CudaRate rate(op, p, p_tensor, x.device());
  const auto options = x.options().dtype(at::kFloat);
  const Tensor logsumexp = at::empty({num_samples, q.rows()}, options);
  Tensor loss;
  if (narrow_head(q)) {
    const Tensor terms = at::empty({num_samples, q.rows()}, options);
    launch_rows(q, 0, q.rows(), q.stream, rate, logsumexp, terms, {}, {});
    loss = terms.mean(0);
  } else {
    loss = at::zeros({q.rows()}, options);
    for_each_chunk(q, cuda_chunks(q), [&](const Chunk& chunk) {
      library_rows(q, chunk, wide_logits(q, chunk, drop_cuda(rate)), logsumexp, loss, {});
    });
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  loss = loss.view(shape);
  shape.insert(shape.begin(), num_samples);
  return {loss, logsumexp.view(shape)};
}

// Of one chunk with all samples: G in the dtype of x, then its two products.
std::array<Tensor, 3> narrow_gradients(const Problem& q, const Chunk& chunk,
                                       const cuda::RateSource& rate, const Tensor& logsumexp,
                                       const Tensor& grad, const std::array<bool, 3>& wanted) {
  const int64_t n = q.classes(), k = q.x.size(1);
  const Tensor dz = at::empty({q.samples * chunk.rows, n}, q.x.options());
  const Tensor lse = logsumexp.narrow(1, chunk.row, chunk.rows).contiguous();
  launch_rows(q, chunk.row, chunk.rows, chunk.stream.rows, rate, lse, {}, grad, dz);
  const HeadSize size{q.samples, chunk.rows, n, k};
  std::array<Tensor, 3> parts;
  if (wanted[0])
    parts[0] = narrow_product(cuda::Product::kDgrad, size, Tensor(), matrix_of(q.weight), dz, {},
                              chunk.stream.rows, rate);
  if (wanted[1])
    parts[1] = narrow_product(cuda::Product::kWgrad, size, q.x.narrow(0, chunk.row, chunk.rows),
                              Tensor(), dz, {}, chunk.stream.rows, rate);
  if (wanted[2]) parts[2] = dz.sum(0);
  return parts;
}

std::tuple<Tensor, Tensor, Tensor> grad_cuda(const Tensor& grad, const Tensor& logsumexp,
                                             const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias, const Tensor& target,
                                             const OptionalTensor& ce_weight, const Tensor& key,
                                             double p, const OptionalTensor& p_tensor,
                                             int64_t ignore_index, double label_smoothing,
                                             int64_t row_offset, int64_t col_offset,
                                             std::array<bool, 3> output_mask) {
  constexpr const char* op = "multi_sample_cross_entropy_grad";
  check_saved(op, grad, logsumexp, x);
  const int64_t samples = logsumexp.size(0);
  const Problem q = problem(op, x, weight, bias, target, ce_weight, key, samples, {}, ignore_index,
                            label_smoothing, row_offset, col_offset);
  const CudaScope scope(x);
  const CudaRate rate(op, p, p_tensor, x.device());
  const Tensor g = grad.reshape(-1).contiguous();
  const Tensor lse = logsumexp.reshape({samples, q.rows()}).contiguous();
  const ChunkSize size = cuda_chunks(q);
  if (narrow_head(q) && q.rows() <= size.rows) {
    const Chunk all{0, q.rows(), {q.stream, 0, samples}};
    auto parts = narrow_gradients(q, all, rate, lse, g, output_mask);
    for (Tensor& part : parts)
      if (!part.defined()) part = at::empty({0}, x.options());
    return {output_mask[0] ? parts[0].view(x.sizes()) : parts[0], parts[1], parts[2]};
  }
  const auto sums = [&](bool wanted, at::IntArrayRef shape) {
    return at::zeros(wanted ? shape : at::IntArrayRef{0}, x.options().dtype(at::kFloat));
  };
  const Tensor dx = sums(output_mask[0], q.x.sizes()), dw = sums(output_mask[1], weight.sizes()),
               db = sums(output_mask[2], {weight.size(0)});
  for_each_chunk(q, size, [&](const Chunk& chunk) {
    const Tensor rows_dx = output_mask[0] ? dx.narrow(0, chunk.row, chunk.rows) : dx;
    if (narrow_head(q)) {
      const auto parts = narrow_gradients(q, chunk, rate, lse, g, output_mask);
      if (output_mask[0]) rows_dx.copy_(parts[0]);
      if (output_mask[1]) dw.add_(parts[1]);
      if (output_mask[2]) db.add_(parts[2]);
      return;
    }
    const Drop drop = drop_cuda(rate);
    const Tensor dz = wide_logits(q, chunk, drop);
    library_rows(q, chunk, dz, lse, {}, g);
    if (output_mask[0]) add_wide_dgrads(dz, weight, chunk.stream, drop, rows_dx);
    if (output_mask[1])
      add_wide_wgrads(dz, q.x.narrow(0, chunk.row, chunk.rows), chunk.stream, drop, dw);
    if (output_mask[2]) db.add_(dz.sum(at::IntArrayRef{0, 1}));
  });
  const auto cast = [&](const Tensor& t) { return t.to(x.scalar_type()); };
  return {output_mask[0] ? cast(dx).view(x.sizes()) : cast(dx), cast(dw), cast(db)};
}

}  // namespace

TORCH_LIBRARY_IMPL(randfuse, CUDA, m) {
  m.impl("multi_sample_cross_entropy", multi_sample_cross_entropy_cuda);
  m.impl("multi_sample_cross_entropy_grad", grad_cuda);
}

#endif  // RANDFUSE_CUDA

}  // namespace randfuse
