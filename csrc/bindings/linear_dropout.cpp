// linear_dropout: residual + D(act(x W^T + b)); act_dropout is its epilogue alone, act_dropout_grad
// the derivative of that. The product is the library's; the epilogue is one pass over what it
// wrote.
#include "../kernels/cpu/linear_dropout.h"

#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "../kernels/cpu/dropout.h"
#include "checks.h"

#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/linear_dropout.h"
#include "cuda.h"
#endif

namespace randfuse {
namespace {

constexpr int64_t kOutputDropout = static_cast<int64_t>(Op::kOutputDropout);

void check_activation(const char* op, std::string_view activation) {
  TORCH_CHECK_VALUE(
      activation == "none" || activation == "relu" || activation == "gelu" || activation == "silu",
      op, ": activation must be one of none, relu, gelu, silu, got '", activation, "'");
}

template <class T>
cpu::ActDropoutArgs<T> arguments(const Tensor& z, const Tensor& out_, bool relu,
                                 const MaskStream& stream, const Rate& rate) {
  cpu::ActDropoutArgs<T> a{};
  a.z = in<T>(z), a.out = out<T>(out_), a.cols = rows_of(z).cols, a.relu = relu, a.stream = stream,
  a.rate = rate;
  return a;
}

// out may be z; both contiguous.
void epilogue(const Tensor& z, const OptionalTensor& residual, std::string_view activation,
              const Tensor& out_, const MaskStream& stream, const Rate& rate) {
  const Tensor a = activation == "gelu" ? at::gelu(z) : activation == "silu" ? at::silu(z) : z;
  const Tensor r = residual.has_value() ? residual->contiguous() : Tensor();
  const Rows shape = rows_of(z);
  dispatch_float(z, [&](auto type) {
    using T = decltype(type);
    auto args = arguments<T>(a, out_, activation == "relu", stream, rate);
    args.residual = r.defined() ? in<T>(r) : nullptr;
    parallel_groups(cpu::mask_groups(shape.rows, shape.cols, stream.col_offset),
                    [&](int64_t begin, int64_t end) { cpu::act_dropout<T>(args, begin, end); });
  });
}

void check_residual(const char* op, const OptionalTensor& residual, const Tensor& like,
                    at::IntArrayRef shape) {
  if (!residual.has_value()) return;
  check_like(op, "residual", *residual, like);
  TORCH_CHECK_VALUE(residual->sizes() == shape, op, ": residual must have shape (…, N) = ", shape,
                    ", got ", residual->sizes());
}

void check_grad(const char* op, const Tensor& grad, const Tensor& z, std::string_view activation) {
  check_float(op, "grad", grad);
  check_activation(op, activation);
  check_like(op, "z", z, grad);
  TORCH_CHECK_VALUE(z.sizes() == grad.sizes(), op, ": z must have shape ", grad.sizes(), ", got ",
                    z.sizes());
}

Tensor act_dropout_cpu(const Tensor& z, const OptionalTensor& residual, c10::string_view activation,
                       const Tensor& key, double p, const OptionalTensor& p_tensor,
                       int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "act_dropout";
  check_float(op, "z", z);
  check_activation(op, activation);
  check_residual(op, residual, z, z.sizes());
  const Rows shape = rows_of(z);
  const KeyedStream stream = mask_stream(op, key, z.device(), shape.rows, shape.cols,
                                         kOutputDropout, 0, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor y = at::empty(z.sizes(), z.options());
  epilogue(z.contiguous(), residual, activation, y, stream, rate);
  return y;
}

Tensor act_dropout_grad_cpu(const Tensor& grad, const Tensor& z, c10::string_view activation,
                            const Tensor& key, double p, const OptionalTensor& p_tensor,
                            int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "act_dropout_grad";
  check_grad(op, grad, z, activation);
  const Rows shape = rows_of(grad);
  const KeyedStream stream = mask_stream(op, key, grad.device(), shape.rows, shape.cols,
                                         kOutputDropout, 0, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor pre = z.contiguous(), dz = at::empty(grad.sizes(), grad.options());
  // The mask comes last: it selects, so a dropped place is 0 whatever the derivative there.
  const Tensor g = activation == "gelu"   ? at::gelu_backward(grad.contiguous(), pre)
                   : activation == "silu" ? at::silu_backward(grad.contiguous(), pre)
                                          : grad.contiguous();
  dispatch_float(grad, [&](auto type) {
    using T = decltype(type);
    auto args = arguments<T>(pre, dz, activation == "relu", stream, rate);
    args.grad = in<T>(g);
    parallel_groups(
        cpu::mask_groups(shape.rows, shape.cols, stream.col_offset),
        [&](int64_t begin, int64_t end) { cpu::act_dropout_grad<T>(args, begin, end); });
  });
  return dz;
}

std::tuple<Tensor, Tensor> linear_dropout_cpu(const Tensor& x, const Tensor& weight,
                                              const OptionalTensor& bias,
                                              const OptionalTensor& residual,
                                              c10::string_view activation, bool save_preact,
                                              const Tensor& key, double p,
                                              const OptionalTensor& p_tensor, int64_t row_offset,
                                              int64_t col_offset) {
  constexpr const char* op = "linear_dropout";
  check_linear(op, x, weight, bias);
  check_activation(op, activation);
  const std::vector<int64_t> shape = with_last(x, weight.size(0));
  check_residual(op, residual, x, shape);
  const int64_t rows = rows_of(x).rows, cols = weight.size(0);
  const KeyedStream stream =
      mask_stream(op, key, x.device(), rows, cols, kOutputDropout, 0, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor z = at::linear(x, weight, bias).contiguous();
  const Tensor y = save_preact ? at::empty(shape, x.options()) : z;
  epilogue(z, residual, activation, y, stream, rate);
  return {y, save_preact ? z : at::empty({0}, x.options())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "linear_dropout(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, "
      "bool save_preact, Tensor key, float p, Tensor? p_tensor, SymInt row_offset, SymInt "
      "col_offset) "
      "-> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "act_dropout(Tensor z, Tensor? residual, str activation, Tensor key, float p, Tensor? "
      "p_tensor, "
      "SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "act_dropout_grad(Tensor grad, Tensor z, str activation, Tensor key, float p, Tensor? "
      "p_tensor, "
      "SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("linear_dropout", linear_dropout_cpu);
  m.impl("act_dropout", act_dropout_cpu);
  m.impl("act_dropout_grad", act_dropout_grad_cpu);
}

#ifdef RANDFUSE_CUDA

namespace {

cuda::Activation activation_of(std::string_view name) {  // check_activation has refused the rest
  return name == "relu"   ? cuda::Activation::kRelu
         : name == "gelu" ? cuda::Activation::kGelu
         : name == "silu" ? cuda::Activation::kSilu
                          : cuda::Activation::kNone;
}

// out_ = other + D(act(z)), or act'(z) * D(other); out_ contiguous and possibly z.
void elementwise_cuda(bool derivative, const Tensor& z, const OptionalTensor& other,
                      std::string_view activation, const Tensor& out_, const MaskStream& stream,
                      const cuda::RateSource& rate) {
  const Tensor zm = matrix_of(z), om = other.has_value() ? matrix_of(*other) : Tensor();
  dispatch_cuda_float(z, [&](auto type) {
    using T = decltype(type);
    cuda::ActDropoutArgs<T> a{};
    a.z = in<T>(zm), a.z_stride = row_stride(zm);
    if (om.defined()) a.other = in<T>(om), a.other_stride = row_stride(om);
    a.out = out<T>(out_), a.rows = zm.size(0), a.cols = zm.size(1);
    a.activation = activation_of(activation), a.stream = stream, a.rate = rate;
    const cudaStream_t queue = c10::cuda::getCurrentCUDAStream();
    C10_CUDA_CHECK(derivative ? cuda::launch_act_dropout_grad(a, queue)
                              : cuda::launch_act_dropout(a, queue));
  });
}

Tensor act_dropout_cuda(const Tensor& z, const OptionalTensor& residual,
                        c10::string_view activation, const Tensor& key, double p,
                        const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "act_dropout";
  check_float(op, "z", z);
  check_activation(op, activation);
  check_residual(op, residual, z, z.sizes());
  const Rows shape = rows_of(z);
  const KeyedStream stream = mask_stream(op, key, z.device(), shape.rows, shape.cols,
                                         kOutputDropout, 0, row_offset, col_offset);
  const CudaScope scope(z);
  const CudaRate rate(op, p, p_tensor, z.device());
  const Tensor y = at::empty(z.sizes(), z.options());
  elementwise_cuda(false, z, residual, activation, y, stream, rate);
  return y;
}

Tensor act_dropout_grad_cuda(const Tensor& grad, const Tensor& z, c10::string_view activation,
                             const Tensor& key, double p, const OptionalTensor& p_tensor,
                             int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "act_dropout_grad";
  check_grad(op, grad, z, activation);
  const Rows shape = rows_of(grad);
  const KeyedStream stream = mask_stream(op, key, grad.device(), shape.rows, shape.cols,
                                         kOutputDropout, 0, row_offset, col_offset);
  const CudaScope scope(grad);
  const CudaRate rate(op, p, p_tensor, grad.device());
  const Tensor dz = at::empty(grad.sizes(), grad.options());
  elementwise_cuda(true, z, grad, activation, dz, stream, rate);
  return dz;
}

std::tuple<Tensor, Tensor> linear_dropout_cuda(const Tensor& x, const Tensor& weight,
                                               const OptionalTensor& bias,
                                               const OptionalTensor& residual,
                                               c10::string_view activation, bool save_preact,
                                               const Tensor& key, double p,
                                               const OptionalTensor& p_tensor, int64_t row_offset,
                                               int64_t col_offset) {
  constexpr const char* op = "linear_dropout";
  check_linear(op, x, weight, bias);
  check_activation(op, activation);
  const std::vector<int64_t> shape = with_last(x, weight.size(0));
  check_residual(op, residual, x, shape);
  const KeyedStream stream = mask_stream(op, key, x.device(), rows_of(x).rows, weight.size(0),
                                         kOutputDropout, 0, row_offset, col_offset);
  const CudaScope scope(x);
  const CudaRate rate(op, p, p_tensor, x.device());
  const Tensor z = at::linear(x, weight, bias).contiguous();
  const Tensor y = save_preact ? at::empty(shape, x.options()) : z;
  elementwise_cuda(false, z, residual, activation, y, stream, rate);
  return {y, save_preact ? z : at::empty({0}, x.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(randfuse, CUDA, m) {
  m.impl("linear_dropout", linear_dropout_cuda);
  m.impl("act_dropout", act_dropout_cuda);
  m.impl("act_dropout_grad", act_dropout_grad_cuda);
}

#endif  // RANDFUSE_CUDA

}  // namespace randfuse
