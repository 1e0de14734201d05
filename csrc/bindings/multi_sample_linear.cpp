// multi_sample_linear and its two gradients: y_m = D_m(x) W_m^T + b_m, dgrad = sum D_m(g_m W_m),
// wgrad_m = g_m^T D_m(x).
//
// Narrow weights: 16 rows of x are taken through all samples while they are in the cache, by the
// kernels of dropout_linear, so x is read from memory once. Wide ones: a dropped copy of one sample
// (of several, if the rows are few) and the library's product.
#include "multi_sample_linear.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../kernels/cpu/dropout_linear.h"
#include "dropout.h"
#include "dropout_linear.h"

#ifdef RANDFUSE_CUDA
#include "cuda.h"
#endif

namespace randfuse {
namespace {

constexpr int64_t kRowBlock = 16;    // rows that go through all samples together
constexpr int64_t kStackRows = 512;  // rows of a library product, if need be of several samples

// x of one sample's weight or bias: the only one, or its own.
template <class T>
T* of_sample(T* x, int64_t s, int64_t samples, int64_t size) {
  return samples == 1 ? x : x + s * size;
}

template <class T, class Out>
cpu::DropoutLinearArgs<T, Out> arguments(int64_t m, int64_t n, int64_t k, const Rate& rate) {
  cpu::DropoutLinearArgs<T, Out> a{};
  a.m = m, a.n = n, a.k = k, a.rate = rate;
  return a;
}

template <class Body>
void dispatch_narrow(const Tensor& x, const Body& body) {  // narrow() has refused double
  dispatch_float(x, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), double>) body(type);
  });
}

// Calls body(s, begin, end) for each sample and each block of rows, blocks outside.
template <class Body>
void rows_through_samples(int64_t rows, int64_t samples, const Body& body) {
  at::parallel_for(0, rows, kRowBlock, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r += kRowBlock) {
      for (int64_t s = 0; s < samples; ++s) body(s, r, std::min(r + kRowBlock, end));
    }
  });
}

void products_narrow(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const SampleStream& stream, const Rate& rate, const Tensor& y) {
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(-2), width = cpu::padded_n(n);
  const Tensor w = matrix_of(weight), b = bias.has_value() ? bias->contiguous() : Tensor();
  const int64_t weights = w.size(0) / n;
  const Tensor packed = at::empty({weights, k, width}, x.options().dtype(at::kFloat));
  dispatch_narrow(x, [&](auto type) {
    using T = decltype(type);
    for (int64_t s = 0; s < weights; ++s) {
      at::parallel_for(0, k, 4096 / n, [&](int64_t begin, int64_t end) {
        cpu::pack_weight_t(in<T>(w) + s * n * row_stride(w), row_stride(w), n,
                           out<float>(packed) + s * k * width, begin, end);
      });
    }
    const auto run = [&](auto result) {
      using Out = decltype(result);
      rows_through_samples(m, stream.count, [&](int64_t s, int64_t begin, int64_t end) {
        auto a = arguments<T, Out>(m, n, k, rate);
        a.x = in<T>(x), a.x_stride = row_stride(x), a.stream = stream[s];
        a.weight_t = of_sample(in<float>(packed), s, weights, k * width);
        a.bias = b.defined() ? of_sample(in<T>(b), s, weights, n) : nullptr;
        a.out = out<Out>(y) + s * m * n;
        cpu::dropout_linear(a, begin, end);
      });
    };
    if (y.scalar_type() == at::kFloat) {
      run(float{});
    } else {
      run(type);
    }
  });
}

void dgrads_narrow(const Tensor& grad, const Tensor& weight, const SampleStream& stream,
                   const Rate& rate, const Tensor& dx) {
  const int64_t m = dx.size(0), k = dx.size(1), n = weight.size(-2);
  const int64_t width = cpu::padded_k(k, stream.rows.col_offset);
  const Tensor w = matrix_of(weight), g = grad.to(at::kFloat).contiguous();
  const int64_t weights = w.size(0) / n;
  const Tensor packed = at::empty({weights * n, width}, dx.options());
  dispatch_narrow(weight, [&](auto type) {
    at::parallel_for(0, weights * n, 1, [&](int64_t begin, int64_t end) {
      cpu::pack_weight(in<decltype(type)>(w), row_stride(w), k, stream.rows.col_offset,
                       out<float>(packed), begin, end);
    });
  });
  rows_through_samples(m, stream.count, [&](int64_t s, int64_t begin, int64_t end) {
    auto a = arguments<float, float>(m, n, k, rate);
    a.grad = in<float>(g) + s * m * n, a.out = out<float>(dx), a.accumulate = true;
    a.weight = of_sample(in<float>(packed), s, weights, n * width), a.stream = stream[s];
    cpu::dropout_linear_dgrad(a, begin, end);
  });
}

void wgrads_narrow(const Tensor& grad, const Tensor& x, const SampleStream& stream,
                   const Rate& rate, const Tensor& dw) {
  const int64_t m = x.size(0), k = x.size(1), n = dw.size(-2);
  const Tensor g = grad.to(at::kFloat).contiguous();
  dispatch_narrow(x, [&](auto type) {
    using T = decltype(type);
    at::parallel_for(0, cpu::padded_k(k, stream.rows.col_offset) / 64, 1,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t s = 0; s < stream.count; ++s) {
                         auto a = arguments<T, float>(m, n, k, rate);
                         a.x = in<T>(x), a.x_stride = row_stride(x), a.stream = stream[s];
                         a.grad = in<float>(g) + s * m * n, a.accumulate = true;
                         a.out = out<float>(dw) + (dw.dim() == 3 ? s * n * k : 0);
                         cpu::dropout_linear_wgrad(a, begin, end);
                       }
                     });
  });
}

// Calls body(first, count) for runs of samples that make a product of some size together.
template <class Body>
void runs_of_samples(int64_t rows, int64_t samples, bool own_weights, const Body& body) {
  const int64_t most =
      own_weights ? 1 : std::max<int64_t>(kStackRows / std::max<int64_t>(rows, 1), 1);
  for (int64_t s = 0; s < samples; s += most) body(s, std::min(most, samples - s));
}

// Dropped copies (count * rows, K) of samples [first, first + count) of the stream.
Tensor dropped_stack(const Tensor& x, const SampleStream& stream, int64_t first, int64_t count,
                     const Drop& drop) {
  const Tensor copies = at::empty({count, x.size(0), x.size(1)}, x.options());
  for (int64_t s = 0; s < count; ++s) drop(x, copies.select(0, s), stream[first + s]);
  return copies.view({count * x.size(0), x.size(1)});
}

Tensor part(const Tensor& x, int64_t first, int64_t count) {  // (count * rows, cols)
  return x.narrow(0, first, count).reshape({count * x.size(1), x.size(2)});
}

Drop drop_cpu(const Rate& rate) {
  return
      [&](const Tensor& x, const Tensor& y, const MaskStream& s) { drop_rows_cpu(x, y, s, rate); };
}

}  // namespace

void wide_products(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const SampleStream& stream, const Drop& drop, const Tensor& y) {
  const bool own = weight.dim() == 3;
  runs_of_samples(x.size(0), stream.count, own, [&](int64_t s, int64_t count) {
    const OptionalTensor b = own && bias.has_value() ? bias->select(0, s) : bias;
    const Tensor copies = dropped_stack(x, stream, s, count, drop);
    const Tensor w = own ? weight.select(0, s) : weight;
    Tensor to = y.narrow(0, s, count).view({copies.size(0), weight.size(-2)});
    if (y.scalar_type() != x.scalar_type()) {
      to.copy_(at::linear(copies, w, b));
    } else if (b.has_value()) {
      at::addmm_out(to, *b, copies, w.t());
    } else {
      at::mm_out(to, copies, w.t());
    }
  });
}

void add_wide_dgrads(const Tensor& grad, const Tensor& weight, const SampleStream& stream,
                     const Drop& drop, const Tensor& dx) {
  const bool own = weight.dim() == 3;
  runs_of_samples(dx.size(0), stream.count, own, [&](int64_t first, int64_t count) {
    const Tensor g = part(grad, first, count).to(weight.scalar_type());
    const Tensor products = at::mm(g, own ? weight.select(0, first) : weight).contiguous();
    for (int64_t s = 0; s < count; ++s) {
      const Tensor product = products.narrow(0, s * dx.size(0), dx.size(0));
      drop(product, product, stream[first + s]);
      dx.add_(product);
    }
  });
}

void add_wide_wgrads(const Tensor& grad, const Tensor& x, const SampleStream& stream,
                     const Drop& drop, const Tensor& dw) {
  const bool own = dw.dim() == 3;
  runs_of_samples(x.size(0), stream.count, own, [&](int64_t s, int64_t count) {
    const Tensor g = part(grad, s, count).to(x.scalar_type()).t();
    const Tensor copies = dropped_stack(x, stream, s, count, drop);
    Tensor sum = own ? dw.select(0, s) : dw;
    if (sum.scalar_type() == x.scalar_type()) {
      at::addmm_out(sum, sum, g, copies);
    } else {
      sum.add_(at::mm(g, copies));
    }
  });
}

Tensor sample_products(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const SampleStream& stream, const Rate& rate, at::ScalarType dtype) {
  const int64_t rows = x.size(0), n = weight.size(-2);
  const Tensor y = at::empty({stream.count, rows, n}, x.options().dtype(dtype));
  if (narrow(x, n, x.size(1))) {
    products_narrow(x, weight, bias, stream, rate, y);
  } else {
    wide_products(x, weight, bias, stream, drop_cpu(rate), y);
  }
  return y;
}

void add_sample_dgrads(const Tensor& grad, const Tensor& weight, const SampleStream& stream,
                       const Rate& rate, const Tensor& dx) {
  if (narrow(weight, weight.size(-2), weight.size(-1)))
    return dgrads_narrow(grad, weight, stream, rate, dx);
  add_wide_dgrads(grad, weight, stream, drop_cpu(rate), dx);
}

void add_sample_wgrads(const Tensor& grad, const Tensor& x, const SampleStream& stream,
                       const Rate& rate, const Tensor& dw) {
  if (narrow(x, dw.size(-2), x.size(1))) return wgrads_narrow(grad, x, stream, rate, dw);
  add_wide_wgrads(grad, x, stream, drop_cpu(rate), dw);
}

namespace {

void check_samples(const char* op, int64_t num_samples) {
  TORCH_CHECK_VALUE(1 <= num_samples && num_samples < int64_t{1} << 32, op,
                    ": num_samples must be in [1, 4294967295], got ", num_samples);
}

// grad (M, …, N): at least one sample and the last dim.
void check_grad(const char* op, const Tensor& grad) {
  check_float(op, "grad", grad);
  TORCH_CHECK_VALUE(grad.dim() >= 2, op, ": grad must have shape (M, …, N), got ", grad.sizes());
  check_samples(op, grad.size(0));
}

void check_weight(const char* op, const Tensor& weight, int64_t samples, int64_t n, int64_t k) {
  const bool fits = weight.dim() == 3 ? weight.size(0) == samples : weight.dim() == 2;
  TORCH_CHECK_VALUE(fits && (n < 0 || weight.size(-2) == n) && (k < 0 || weight.size(-1) == k), op,
                    ": weight must have shape (N, K) or (M, N, K) with M=", samples,
                    n < 0 ? "" : ", N=" + std::to_string(n),
                    k < 0 ? "" : ", K=" + std::to_string(k), ", got ", weight.sizes());
}

KeyedStream input_stream(const char* op, const Tensor& key, const Tensor& like, int64_t rows,
                         int64_t cols, int64_t row_offset, int64_t col_offset) {
  return mask_stream(op, key, like.device(), rows, cols, static_cast<int64_t>(Op::kDropout), 0,
                     row_offset, col_offset);
}

void check_forward(const char* op, const Tensor& x, const Tensor& weight,
                   const OptionalTensor& bias, int64_t num_samples) {
  check_samples(op, num_samples);
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have at least one dimension, got 0");
  check_like(op, "weight", weight, x);
  check_weight(op, weight, num_samples, -1, x.size(-1));
  if (bias.has_value()) {
    check_like(op, "bias", *bias, x);
    TORCH_CHECK_VALUE(bias->sizes() == weight.sizes().slice(0, weight.dim() - 1), op,
                      ": bias must have shape ", weight.sizes().slice(0, weight.dim() - 1),
                      ", got ", bias->sizes());
  }
}

void check_dgrad(const char* op, const Tensor& grad, const Tensor& weight) {
  check_grad(op, grad);
  check_like(op, "weight", weight, grad);
  check_weight(op, weight, grad.size(0), grad.size(-1), -1);
}

void check_wgrad(const char* op, const Tensor& grad, const Tensor& x) {
  check_grad(op, grad);
  check_like(op, "x", x, grad);
  TORCH_CHECK_VALUE(x.dim() + 1 == grad.dim() &&
                        x.sizes().slice(0, x.dim() - 1) == grad.sizes().slice(1, x.dim() - 1),
                    op, ": x must have shape (…, K) of grad (M, …, N) = ", grad.sizes(), ", got ",
                    x.sizes());
}

std::vector<int64_t> without_first(std::vector<int64_t> sizes) {
  sizes.erase(sizes.begin());
  return sizes;
}

Tensor multi_sample_linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               const Tensor& key, int64_t num_samples, double p,
                               const OptionalTensor& p_tensor, int64_t row_offset,
                               int64_t col_offset) {
  constexpr const char* op = "multi_sample_linear";
  check_forward(op, x, weight, bias, num_samples);
  const Rows shape = rows_of(x);
  const KeyedStream stream =
      input_stream(op, key, x, shape.rows, shape.cols, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  std::vector<int64_t> sizes = with_last(x, weight.size(-2));
  sizes.insert(sizes.begin(), num_samples);
  return sample_products(matrix_of(x), weight, bias, {stream, 0, num_samples}, rate,
                         x.scalar_type())
      .view(sizes);
}

Tensor dgrad_cpu(const Tensor& grad, const Tensor& weight, const Tensor& key, double p,
                 const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "multi_sample_linear_dgrad";
  check_dgrad(op, grad, weight);
  const int64_t samples = grad.size(0), n = grad.size(-1), k = weight.size(-1);
  const int64_t rows = rows_of(grad).rows / samples;
  const KeyedStream stream = input_stream(op, key, grad, rows, k, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor dx = at::zeros({rows, k}, grad.options().dtype(sum_type(grad)));
  add_sample_dgrads(grad.reshape({samples, rows, n}), weight, {stream, 0, samples}, rate, dx);
  return dx.to(grad.scalar_type()).view(without_first(with_last(grad, k)));
}

Tensor wgrad_cpu(const Tensor& grad, const Tensor& x, bool shared, const Tensor& key, double p,
                 const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "multi_sample_linear_wgrad";
  check_wgrad(op, grad, x);
  const Rows shape = rows_of(x);
  const int64_t samples = grad.size(0), n = grad.size(-1);
  const KeyedStream stream =
      input_stream(op, key, x, shape.rows, shape.cols, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const auto options = grad.options().dtype(sum_type(grad));
  const Tensor dw =
      shared ? at::zeros({n, shape.cols}, options) : at::zeros({samples, n, shape.cols}, options);
  add_sample_wgrads(grad.reshape({samples, shape.rows, n}), matrix_of(x), {stream, 0, samples},
                    rate, dw);
  return dw.to(grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "multi_sample_linear(Tensor x, Tensor weight, Tensor? bias, Tensor key, int num_samples, "
      "float p, Tensor? p_tensor, SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "multi_sample_linear_dgrad(Tensor grad, Tensor weight, Tensor key, float p, Tensor? "
      "p_tensor, SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "multi_sample_linear_wgrad(Tensor grad, Tensor x, bool shared, Tensor key, float p, Tensor? "
      "p_tensor, SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("multi_sample_linear", multi_sample_linear_cpu);
  m.impl("multi_sample_linear_dgrad", dgrad_cpu);
  m.impl("multi_sample_linear_wgrad", wgrad_cpu);
}

#ifdef RANDFUSE_CUDA

Drop drop_cuda(const cuda::RateSource& rate) {
  return
      [&](const Tensor& x, const Tensor& y, const MaskStream& s) { drop_rows_cuda(x, y, s, rate); };
}

namespace {

// One weight for all samples, of a width and a dtype that the kernels take.
bool narrow_head(const Tensor& like, int64_t weight_dim, int64_t m, int64_t n, int64_t k) {
  return weight_dim == 2 && narrow_cuda(like, m, n, k);
}

Tensor multi_sample_linear_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                const Tensor& key, int64_t num_samples, double p,
                                const OptionalTensor& p_tensor, int64_t row_offset,
                                int64_t col_offset) {
  constexpr const char* op = "multi_sample_linear";
  check_forward(op, x, weight, bias, num_samples);
  const Rows shape = rows_of(x);
  const KeyedStream stream =
      input_stream(op, key, x, shape.rows, shape.cols, row_offset, col_offset);
  const CudaScope scope(x);
  const CudaRate rate(op, p, p_tensor, x.device());
  const int64_t n = weight.size(-2);
  const Tensor matrix = matrix_of(x);
  Tensor y;
  if (narrow_head(x, weight.dim(), shape.rows, n, shape.cols)) {
    y = narrow_product(cuda::Product::kForward, {num_samples, shape.rows, n, shape.cols}, matrix,
                       matrix_of(weight), Tensor(), bias, stream, rate);
  } else {
    y = at::empty({num_samples, shape.rows, n}, x.options());
    wide_products(matrix, weight, bias, {stream, 0, num_samples}, drop_cuda(rate), y);
  }
  std::vector<int64_t> sizes = with_last(x, n);
  sizes.insert(sizes.begin(), num_samples);
  return y.view(sizes);
}

Tensor dgrad_cuda(const Tensor& grad, const Tensor& weight, const Tensor& key, double p,
                  const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "multi_sample_linear_dgrad";
  check_dgrad(op, grad, weight);
  const int64_t samples = grad.size(0), n = grad.size(-1), k = weight.size(-1);
  const int64_t rows = rows_of(grad).rows / samples;
  const KeyedStream stream = input_stream(op, key, grad, rows, k, row_offset, col_offset);
  const CudaScope scope(grad);
  const CudaRate rate(op, p, p_tensor, grad.device());
  Tensor dx;
  if (narrow_head(grad, weight.dim(), rows, n, k)) {
    dx = narrow_product(cuda::Product::kDgrad, {samples, rows, n, k}, Tensor(), matrix_of(weight),
                        matrix_of(grad), {}, stream, rate);
  } else {
    dx = at::zeros({rows, k}, grad.options().dtype(at::kFloat));
    add_wide_dgrads(grad.reshape({samples, rows, n}), weight, {stream, 0, samples}, drop_cuda(rate),
                    dx);
  }
  return dx.to(grad.scalar_type()).view(without_first(with_last(grad, k)));
}

Tensor wgrad_cuda(const Tensor& grad, const Tensor& x, bool shared, const Tensor& key, double p,
                  const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "multi_sample_linear_wgrad";
  check_wgrad(op, grad, x);
  const Rows shape = rows_of(x);
  const int64_t samples = grad.size(0), n = grad.size(-1), k = shape.cols;
  const KeyedStream stream = input_stream(op, key, x, shape.rows, k, row_offset, col_offset);
  const CudaScope scope(x);
  const CudaRate rate(op, p, p_tensor, x.device());
  if (narrow_head(grad, shared ? 2 : 3, shape.rows, n, k)) {
    return narrow_product(cuda::Product::kWgrad, {samples, shape.rows, n, k}, matrix_of(x),
                          Tensor(), matrix_of(grad), {}, stream, rate);
  }
  const auto options = grad.options().dtype(at::kFloat);
  const Tensor dw = shared ? at::zeros({n, k}, options) : at::zeros({samples, n, k}, options);
  add_wide_wgrads(grad.reshape({samples, shape.rows, n}), matrix_of(x), {stream, 0, samples},
                  drop_cuda(rate), dw);
  return dw.to(grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(randfuse, CUDA, m) {
  m.impl("multi_sample_linear", multi_sample_linear_cuda);
  m.impl("multi_sample_linear_dgrad", dgrad_cuda);
  m.impl("multi_sample_linear_wgrad", wgrad_cuda);
}

#endif  // RANDFUSE_CUDA

}  // namespace randfuse
