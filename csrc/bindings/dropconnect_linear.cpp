// dropconnect_linear: y = x D(W)^T + b. D(W) lives as long as the product; the derivatives,
// composed in Python of products and of dropout, draw it again.
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "checks.h"
#include "dropout.h"

namespace randfuse {
namespace {

constexpr int64_t kWeightMask = static_cast<int64_t>(Op::kWeightMask);

Tensor dropconnect_linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor& key, double p, const OptionalTensor& p_tensor,
                              int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "dropconnect_linear";
  check_linear(op, x, weight, bias);
  const KeyedStream stream = mask_stream(op, key, x.device(), weight.size(0), weight.size(1),
                                         kWeightMask, 0, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor dropped = at::empty(weight.sizes(), weight.options());
  drop_rows_cpu(matrix_of(weight), dropped, stream, rate);
  return at::linear(x, dropped, bias).contiguous();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "dropconnect_linear(Tensor x, Tensor weight, Tensor? bias, Tensor key, float p, Tensor? "
      "p_tensor, SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) { m.impl("dropconnect_linear", dropconnect_linear_cpu); }

}  // namespace randfuse
