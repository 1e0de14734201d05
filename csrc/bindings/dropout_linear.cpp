// dropout_linear and its two gradients: y = D(x) W^T + b, dgrad = D(g W), wgrad = g^T D(x).
#include "../kernels/cpu/dropout_linear.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "../kernels/cpu/isa.h"
#include "dropout.h"
#include "dropout_linear.h"

#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/dropout_linear.h"
#include "cuda.h"
#endif

namespace randfuse {
namespace {

constexpr int64_t kInputDropout = static_cast<int64_t>(Op::kDropout);

Tensor scratch(const Tensor& like, int64_t rows, int64_t cols) {
  return at::empty({rows, cols}, like.options().dtype(at::kFloat));
}

template <class T, class Out = T>
cpu::DropoutLinearArgs<T, Out> arguments(int64_t m, int64_t n, int64_t k, const Tensor& out_,
                                         const MaskStream& stream, const Rate& rate) {
  cpu::DropoutLinearArgs<T, Out> a{};
  a.m = m, a.n = n, a.k = k, a.out = out<Out>(out_), a.stream = stream, a.rate = rate;
  return a;
}

// Calls body(T{}, Out{}) with the types of x and of a result that is float32 or of x's type.
template <class Body>
void dispatch_narrow(const Tensor& x, const Tensor& result, const Body& body) {
  dispatch_float(x, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      if (result.scalar_type() == at::kFloat) {
        body(type, float{});
      } else {
        body(type, type);
      }
    }
  });
}

void check_operands(const char* op, const char* name, const Tensor& grad, const char* other,
                    const Tensor& b) {
  check_float(op, name, grad);
  TORCH_CHECK_VALUE(grad.dim() >= 1, op, ": ", name, " must have at least one dimension, got 0");
  check_like(op, other, b, grad);
}

void check_dgrad(const char* op, const Tensor& grad, const Tensor& weight) {
  check_operands(op, "grad", grad, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == grad.size(-1), op,
                    ": weight must have shape (N=", grad.size(-1), ", K), got ", weight.sizes());
}

void check_wgrad(const char* op, const Tensor& grad, const Tensor& x) {
  check_operands(op, "grad", grad, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have at least one dimension, got 0");
  const std::vector<int64_t> sizes = with_last(grad, x.size(-1));
  const at::IntArrayRef shape = sizes;
  TORCH_CHECK_VALUE(x.sizes() == shape, op, ": x must have shape (…, K) = ", shape, ", got ",
                    x.sizes());
}

Tensor dropout_linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const Tensor& key, double p, const OptionalTensor& p_tensor,
                          int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "dropout_linear";
  check_linear(op, x, weight, bias);
  const Rows shape = rows_of(x);
  const KeyedStream stream = mask_stream(op, key, x.device(), shape.rows, shape.cols, kInputDropout,
                                         0, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor matrix = matrix_of(x);
  const Tensor y = narrow(x, weight.size(0), shape.cols)
                       ? forward_narrow(matrix, weight, bias, stream, rate, x.scalar_type())
                       : at::linear(dropped(matrix, stream, rate), weight, bias);
  return y.view(with_last(x, weight.size(0)));
}

Tensor dgrad_cpu(const Tensor& grad, const Tensor& weight, const Tensor& key, double p,
                 const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "dropout_linear_dgrad";
  check_dgrad(op, grad, weight);
  const Rows shape = rows_of(grad);
  const KeyedStream stream = mask_stream(op, key, grad.device(), shape.rows, weight.size(1),
                                         kInputDropout, 0, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor matrix = grad.reshape({shape.rows, shape.cols});
  Tensor dx;
  if (narrow(grad, shape.cols, weight.size(1))) {
    dx = at::empty({shape.rows, weight.size(1)}, grad.options());
    dgrad_narrow(matrix, weight, dx, false, stream, rate);
  } else {
    dx = at::mm(matrix, weight).contiguous();
    drop_rows_cpu(dx, dx, stream, rate);  // in place: one pass over what the product just wrote
  }
  return dx.view(with_last(grad, weight.size(1)));
}

Tensor wgrad_cpu(const Tensor& grad, const Tensor& x, const Tensor& key, double p,
                 const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "dropout_linear_wgrad";
  check_wgrad(op, grad, x);
  const Rows shape = rows_of(x), outer = rows_of(grad);
  const KeyedStream stream = mask_stream(op, key, x.device(), shape.rows, shape.cols, kInputDropout,
                                         0, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor g = grad.reshape({outer.rows, outer.cols}), matrix = matrix_of(x);
  if (narrow(grad, outer.cols, shape.cols)) {
    return wgrad_narrow(g, matrix, stream, rate, grad.scalar_type());
  }
  return at::mm(g.t(), dropped(matrix, stream, rate)).contiguous();
}

}  // namespace

bool narrow(const Tensor& x, int64_t n, int64_t k) {
  const int64_t widest = active_isa() == Isa::kAvx512 ? cpu::kMaxNarrow : 16;
  return 0 < n && n <= widest && k > 0 && x.scalar_type() != at::kDouble;
}

Tensor dropped(const Tensor& x, const MaskStream& stream, const Rate& rate) {
  const Tensor y = at::empty(x.sizes(), x.options());
  drop_rows_cpu(x, y, stream, rate);
  return y;
}

Tensor forward_narrow(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const MaskStream& stream, const Rate& rate, at::ScalarType dtype) {
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
  const Tensor y = at::empty({m, n}, x.options().dtype(dtype)),
               packed = scratch(x, k, cpu::padded_n(n)), w = matrix_of(weight),
               b = bias.has_value() ? bias->contiguous() : Tensor();
  dispatch_narrow(w, packed, [&](auto type, auto) {
    at::parallel_for(0, k, 4096 / n, [&](int64_t begin, int64_t end) {
      cpu::pack_weight_t(in<decltype(type)>(w), row_stride(w), n, out<float>(packed), begin, end);
    });
  });
  dispatch_narrow(x, y, [&](auto type, auto result) {
    using T = decltype(type);
    auto a = arguments<T, decltype(result)>(m, n, k, y, stream, rate);
    a.x = in<T>(x), a.x_stride = row_stride(x), a.weight_t = in<float>(packed);
    a.bias = b.defined() ? in<T>(b) : nullptr;
    at::parallel_for(0, m, 16,
                     [&](int64_t begin, int64_t end) { cpu::dropout_linear(a, begin, end); });
  });
  return y;
}

void dgrad_narrow(const Tensor& grad, const Tensor& weight, const Tensor& dx, bool accumulate,
                  const MaskStream& stream, const Rate& rate) {
  const int64_t m = grad.size(0), k = weight.size(1), n = weight.size(0);
  const Tensor g = grad.to(at::kFloat).contiguous(), w = matrix_of(weight),
               packed = scratch(grad, n, cpu::padded_k(k, stream.col_offset));
  dispatch_narrow(w, packed, [&](auto type, auto) {
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      cpu::pack_weight(in<decltype(type)>(w), row_stride(w), k, stream.col_offset,
                       out<float>(packed), begin, end);
    });
  });
  dispatch_narrow(dx, packed, [&](auto type, auto) {
    auto a = arguments<decltype(type)>(m, n, k, dx, stream, rate);
    a.grad = in<float>(g), a.weight = in<float>(packed), a.accumulate = accumulate;
    at::parallel_for(0, m, 16,
                     [&](int64_t begin, int64_t end) { cpu::dropout_linear_dgrad(a, begin, end); });
  });
}

Tensor wgrad_narrow(const Tensor& grad, const Tensor& x, const MaskStream& stream, const Rate& rate,
                    at::ScalarType dtype) {
  const int64_t m = x.size(0), k = x.size(1), n = grad.size(1);
  const Tensor dw = at::empty({n, k}, x.options().dtype(dtype)),
               g = grad.to(at::kFloat).contiguous();
  dispatch_narrow(x, dw, [&](auto type, auto result) {
    using T = decltype(type);
    auto a = arguments<T, decltype(result)>(m, n, k, dw, stream, rate);
    a.grad = in<float>(g), a.x = in<T>(x), a.x_stride = row_stride(x);
    at::parallel_for(0, cpu::padded_k(k, stream.col_offset) / 64, 1,
                     [&](int64_t begin, int64_t end) { cpu::dropout_linear_wgrad(a, begin, end); });
  });
  return dw;
}

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "dropout_linear(Tensor x, Tensor weight, Tensor? bias, Tensor key, float p, Tensor? "
      "p_tensor, "
      "SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dropout_linear_dgrad(Tensor grad, Tensor weight, Tensor key, float p, Tensor? p_tensor, "
      "SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dropout_linear_wgrad(Tensor grad, Tensor x, Tensor key, float p, Tensor? p_tensor, "
      "SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("dropout_linear", dropout_linear_cpu);
  m.impl("dropout_linear_dgrad", dgrad_cpu);
  m.impl("dropout_linear_wgrad", wgrad_cpu);
}

#ifdef RANDFUSE_CUDA

namespace {

// The kernels for narrow weights take what their tiles and tensor cores take. Every such shape goes
// to them: by the byte counts at the top of dropout_linear.cuh they move 2MK bytes where the
// dropped copy costs 4MK more. A measured crossover replaces this rule once it has run on a GPU.
bool narrow_cuda(const Tensor& x, int64_t m, int64_t n, int64_t k) {
  return m > 0 && 0 < n && n <= cuda::kMaxN && k > 0 && x.scalar_type() != at::kFloat;
}

// One of the three products; of x, weight and grad the two that it has are defined.
Tensor narrow_product(cuda::Product product, int64_t m, int64_t n, int64_t k, const Tensor& x,
                      const Tensor& weight, const Tensor& grad, const OptionalTensor& bias,
                      const MaskStream& stream, const cuda::RateSource& rate) {
  const Tensor& like = x.defined() ? x : grad;
  const Tensor y = at::empty(
      {product == cuda::Product::kWgrad ? n : m, product == cuda::Product::kForward ? n : k},
      like.options());
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  int64_t floats = 0;
  C10_CUDA_CHECK(cuda::dropout_linear_workspace(product, m, n, k, stream.col_offset, &floats));
  const Tensor workspace = at::empty({floats}, like.options().dtype(at::kFloat));
  dispatch_cuda_float(like, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, float>) {  // narrow_cuda
      cuda::DropoutLinearArgs<T> a{};
      a.m = m, a.n = n, a.k = k, a.out = out<T>(y), a.workspace = out<float>(workspace);
      if (x.defined()) a.x = in<T>(x), a.x_stride = row_stride(x);
      if (weight.defined()) a.weight = in<T>(weight), a.weight_stride = row_stride(weight);
      if (grad.defined()) a.grad = in<T>(grad), a.grad_stride = row_stride(grad);
      if (b.defined()) a.bias = in<T>(b);
      a.stream = stream, a.rate = rate;
      C10_CUDA_CHECK(cuda::launch_dropout_linear(product, a, c10::cuda::getCurrentCUDAStream()));
    }
  });
  return y;
}

Tensor dropped_cuda(const Tensor& x, const MaskStream& stream, const cuda::RateSource& rate) {
  const Tensor y = at::empty(x.sizes(), x.options());
  drop_rows_cuda(x, y, stream, rate);
  return y;
}

Tensor dropout_linear_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const Tensor& key, double p, const OptionalTensor& p_tensor,
                           int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "dropout_linear";
  check_linear(op, x, weight, bias);
  const Rows shape = rows_of(x);
  const int64_t n = weight.size(0);
  const KeyedStream stream = mask_stream(op, key, x.device(), shape.rows, shape.cols, kInputDropout,
                                         0, row_offset, col_offset);
  const CudaScope scope(x);
  const CudaRate rate(op, p, p_tensor, x.device());
  const Tensor matrix = matrix_of(x);
  const Tensor y = narrow_cuda(x, shape.rows, n, shape.cols)
                       ? narrow_product(cuda::Product::kForward, shape.rows, n, shape.cols, matrix,
                                        matrix_of(weight), Tensor(), bias, stream, rate)
                       : at::linear(dropped_cuda(matrix, stream, rate), weight, bias);
  return y.view(with_last(x, n));
}

Tensor dgrad_cuda(const Tensor& grad, const Tensor& weight, const Tensor& key, double p,
                  const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "dropout_linear_dgrad";
  check_dgrad(op, grad, weight);
  const Rows shape = rows_of(grad);
  const int64_t k = weight.size(1);
  const KeyedStream stream =
      mask_stream(op, key, grad.device(), shape.rows, k, kInputDropout, 0, row_offset, col_offset);
  const CudaScope scope(grad);
  const CudaRate rate(op, p, p_tensor, grad.device());
  Tensor dx;
  if (narrow_cuda(grad, shape.rows, shape.cols, k)) {
    dx = narrow_product(cuda::Product::kDgrad, shape.rows, shape.cols, k, Tensor(),
                        matrix_of(weight), matrix_of(grad), {}, stream, rate);
  } else {
    dx = at::mm(grad.reshape({shape.rows, shape.cols}), weight).contiguous();
    drop_rows_cuda(dx, dx, stream, rate);  // in place: one pass over what the product just wrote
  }
  return dx.view(with_last(grad, k));
}

Tensor wgrad_cuda(const Tensor& grad, const Tensor& x, const Tensor& key, double p,
                  const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "dropout_linear_wgrad";
  check_wgrad(op, grad, x);
  const Rows shape = rows_of(x), outer = rows_of(grad);
  const KeyedStream stream = mask_stream(op, key, x.device(), shape.rows, shape.cols, kInputDropout,
                                         0, row_offset, col_offset);
  const CudaScope scope(x);
  const CudaRate rate(op, p, p_tensor, x.device());
  const Tensor matrix = matrix_of(x);
  if (narrow_cuda(grad, shape.rows, outer.cols, shape.cols)) {
    return narrow_product(cuda::Product::kWgrad, shape.rows, outer.cols, shape.cols, matrix,
                          Tensor(), matrix_of(grad), {}, stream, rate);
  }
  const Tensor g = grad.reshape({outer.rows, outer.cols});
  return at::mm(g.t(), dropped_cuda(matrix, stream, rate)).contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(randfuse, CUDA, m) {
  m.impl("dropout_linear", dropout_linear_cuda);
  m.impl("dropout_linear_dgrad", dgrad_cuda);
  m.impl("dropout_linear_wgrad", wgrad_cuda);
}

#endif  // RANDFUSE_CUDA

}  // namespace randfuse
