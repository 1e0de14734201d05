// mixout: w' = a + D(w - a), and mixout_linear: y = x w'^T + b. w' lives as long as the product;
// the derivatives, composed in Python of products, mixout and dropout, make it again.
#include "../kernels/cpu/mixout_linear.h"

#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "../kernels/cpu/dropout.h"
#include "checks.h"

namespace randfuse {
namespace {

constexpr int64_t kWeightMask = static_cast<int64_t>(Op::kWeightMask);

void check_anchor(const char* op, const Tensor& weight, const Tensor& anchor) {
  check_float(op, "weight", weight);
  check_like(op, "anchor", anchor, weight);
  TORCH_CHECK_VALUE(anchor.sizes() == weight.sizes(), op,
                    ": anchor must have the shape of weight = ", weight.sizes(), ", got ",
                    anchor.sizes());
}

// a + D(w - a) of checked operands, row-major.
Tensor mixed(const char* op, const Tensor& weight, const Tensor& anchor, const Tensor& key,
             double p, const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  const Rows shape = rows_of(weight);
  const KeyedStream stream = mask_stream(op, key, weight.device(), shape.rows, shape.cols,
                                         kWeightMask, 0, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  // The weight itself, which a + (w - a) need not be when rounded.
  if (rate.threshold == 0) return weight.clone(at::MemoryFormat::Contiguous);
  const Tensor y = at::empty(weight.sizes(), weight.options());
  const Tensor w = matrix_of(weight), a = matrix_of(anchor);
  dispatch_float(weight, [&](auto type) {
    using T = decltype(type);
    const cpu::MixoutArgs<T> args{in<T>(w),      in<T>(a),      out<T>(y), shape.cols,
                                  row_stride(w), row_stride(a), stream,    rate};
    parallel_groups(cpu::mask_groups(shape.rows, shape.cols, col_offset),
                    [&](int64_t begin, int64_t end) { cpu::mixout<T>(args, begin, end); });
  });
  return y;
}

Tensor mixout_cpu(const Tensor& weight, const Tensor& anchor, const Tensor& key, double p,
                  const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  check_anchor("mixout", weight, anchor);
  return mixed("mixout", weight, anchor, key, p, p_tensor, row_offset, col_offset);
}

Tensor mixout_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& anchor,
                         const OptionalTensor& bias, const Tensor& key, double p,
                         const OptionalTensor& p_tensor, int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "mixout_linear";
  check_anchor(op, weight, anchor);
  check_float(op, "x", x);
  const NoAutocast no_autocast;
  // Under autocast x is narrower than the weights, which are mixed before they are rounded.
  const Tensor w =
      mixed(op, weight, anchor, key, p, p_tensor, row_offset, col_offset).to(x.scalar_type());
  check_linear(op, x, w, bias);
  return at::linear(x, w, bias).contiguous();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "mixout(Tensor weight, Tensor anchor, Tensor key, float p, Tensor? p_tensor, SymInt "
      "row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "mixout_linear(Tensor x, Tensor weight, Tensor anchor, Tensor? bias, Tensor key, float p, "
      "Tensor? p_tensor, SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("mixout", mixout_cpu);
  m.impl("mixout_linear", mixout_linear_cpu);
}

}  // namespace randfuse
