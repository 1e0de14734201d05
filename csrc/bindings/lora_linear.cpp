// A linear layer with a low-rank adapter, y = x W^T + bias + scaling s B^T with s = D(x) A^T, and
// the products that its derivatives need. Of x (M,K), with adapters of rank r:
//
//   forward  reads x once beside the base product (eager: 7MK bytes in 16-bit types, here 2MK) and
//            adds to y in place;   dgrad  adds D(ds A) to the base's dx in place, one pass;
//   wgrad    reads x once and regenerates the mask.
//
// Kept for backward are x (if A is trained), weights, and s: M r numbers. Everything of the size of
// r is float32 (float64 for float64 data), whatever the dtype of x, and A and B may be float32
// beside 16-bit x and W, as PEFT has them: x is then read as it is and not widened in memory, but
// for ranks too wide for the narrow kernels, whose products are the library's in float32.
// All four kernels are those of dropout_linear; p = 0 draws nothing.
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "dropout.h"
#include "dropout_linear.h"

namespace randfuse {
namespace {

constexpr int64_t kInputDropout = static_cast<int64_t>(Op::kDropout);

at::ScalarType wide(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// s (…, r): float32, or float64 beside float64.
void check_wide(const char* op, const char* name, const Tensor& s, const Tensor& like) {
  TORCH_CHECK_TYPE(s.scalar_type() == wide(like), op, ": ", name, " must be ",
                   wide(like) == at::kDouble ? "torch.float64" : "torch.float32", ", got ",
                   dtype_name(s));
  TORCH_CHECK_VALUE(s.device() == like.device(), op, ": ", name, " must be on ", like.device(),
                    ", got ", s.device());
  TORCH_CHECK_VALUE(s.dim() >= 1, op, ": ", name, " must have at least one dimension, got 0");
}

// A factor of the adapter: of x's dtype, or float32.
void check_factor(const char* op, const char* name, const Tensor& factor, const Tensor& like,
                  int64_t rows, int64_t cols, const char* letters) {
  const bool same = factor.scalar_type() == like.scalar_type();
  TORCH_CHECK_TYPE(same || factor.scalar_type() == wide(like), op, ": ", name, " must be ",
                   dtype_name(like), wide(like) == at::kFloat ? " or torch.float32" : "", ", got ",
                   dtype_name(factor));
  TORCH_CHECK_VALUE(factor.device() == like.device(), op, ": ", name, " must be on ", like.device(),
                    ", got ", factor.device());
  TORCH_CHECK_VALUE(factor.dim() == 2 && factor.size(0) == rows && factor.size(1) == cols, op, ": ",
                    name, " must have shape ", letters, " = (", rows, ", ", cols, "), got ",
                    factor.sizes());
}

// D(x) for the library's product with a factor, s or ds: wide, since rounding those to 16 bits
// would cost their digits, and in float16 their range.
Tensor wide_dropped(const Tensor& x, const MaskStream& stream, const Rate& rate) {
  const Tensor own = x.to(wide(x));
  return rate.threshold == 0 ? own : dropped(own, stream, rate);
}

// D(x) A^T, wide.
Tensor down(const Tensor& x, const Tensor& a, const MaskStream& stream, const Rate& rate) {
  if (narrow(x, a.size(0), x.size(1))) return forward_narrow(x, a, {}, stream, rate, at::kFloat);
  return at::linear(wide_dropped(x, stream, rate), a.to(wide(x)));
}

// y += D(s b), s (rows, r) wide, b (r, cols); with threshold 0, y += scale s b.
void add_up(const Tensor& y, const Tensor& s, const Tensor& b, const MaskStream& stream,
            const Rate& rate) {
  if (rate.threshold == 0 && y.scalar_type() == s.scalar_type()) {
    y.addmm_(s, b.to(s.scalar_type()), 1, rate.scale);
  } else if (narrow(y, b.size(0), b.size(1))) {
    dgrad_narrow(s, b, y, true, stream, rate);
  } else {
    const Tensor update = at::mm(s, b.to(s.scalar_type()));
    if (rate.threshold != 0) drop_rows_cpu(update, update, stream, rate);
    y.add_(update, rate.threshold == 0 ? rate.scale : 1.0);
  }
}

std::tuple<Tensor, Tensor> lora_linear_cpu(const Tensor& x, const Tensor& weight,
                                           const OptionalTensor& bias, const Tensor& lora_a,
                                           const Tensor& lora_b, double scaling, const Tensor& key,
                                           double p, const OptionalTensor& p_tensor, int64_t sample,
                                           int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "lora_linear";
  check_linear(op, x, weight, bias);
  TORCH_CHECK_VALUE(lora_a.dim() == 2, op, ": lora_a must have shape (r, K), got ", lora_a.sizes());
  const int64_t rank = lora_a.size(0), n = weight.size(0);
  check_factor(op, "lora_a", lora_a, x, rank, x.size(-1), "(r, K)");
  check_factor(op, "lora_b", lora_b, x, n, rank, "(N, r)");
  const Rows shape = rows_of(x);
  const KeyedStream stream = mask_stream(op, key, x.device(), shape.rows, shape.cols, kInputDropout,
                                         sample, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor matrix = matrix_of(x), y = at::linear(matrix, weight, bias).contiguous(),
               s = down(matrix, lora_a, stream, rate);
  MaskStream whole = stream;
  whole.col_offset = 0;
  add_up(y, s, lora_b.t(), whole, Rate{0, scaling});
  return {y.view(with_last(x, n)), s.view(with_last(x, rank))};
}

Tensor down_cpu(const Tensor& x, const Tensor& lora_a, const Tensor& key, double p,
                const OptionalTensor& p_tensor, int64_t sample, int64_t row_offset,
                int64_t col_offset) {
  constexpr const char* op = "lora_linear_down";
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have at least one dimension, got 0");
  TORCH_CHECK_VALUE(lora_a.dim() == 2, op, ": lora_a must have shape (r, K), got ", lora_a.sizes());
  check_factor(op, "lora_a", lora_a, x, lora_a.size(0), x.size(-1), "(r, K)");
  const Rows shape = rows_of(x);
  const KeyedStream stream = mask_stream(op, key, x.device(), shape.rows, shape.cols, kInputDropout,
                                         sample, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  return down(matrix_of(x), lora_a, stream, rate).view(with_last(x, lora_a.size(0)));
}

Tensor dgrad_cpu(const Tensor& grad, const Tensor& weight, const Tensor& ds, const Tensor& lora_a,
                 const Tensor& key, double p, const OptionalTensor& p_tensor, int64_t sample,
                 int64_t row_offset, int64_t col_offset) {
  constexpr const char* op = "lora_linear_dgrad";
  check_float(op, "grad", grad);
  check_wide(op, "ds", ds, grad);
  check_like(op, "weight", weight, grad);
  TORCH_CHECK_VALUE(grad.dim() >= 1 && weight.dim() == 2 && weight.size(0) == grad.size(-1), op,
                    ": weight must have shape (N, K) with grad (…, N), got ", weight.sizes(),
                    " and ", grad.sizes());
  const int64_t k = weight.size(1);
  check_factor(op, "lora_a", lora_a, grad, ds.size(-1), k, "(r, K)");
  const Rows shape = rows_of(grad), inner = rows_of(ds);
  TORCH_CHECK_VALUE(inner.rows == shape.rows, op, ": ds must have the ", shape.rows,
                    " rows of grad, got ", inner.rows);
  const KeyedStream stream = mask_stream(op, key, grad.device(), shape.rows, k, kInputDropout,
                                         sample, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor dx = at::mm(grad.reshape({shape.rows, shape.cols}), weight).contiguous();
  add_up(dx, ds.reshape({inner.rows, inner.cols}), lora_a, stream, rate);
  return dx.view(with_last(grad, k));
}

Tensor wgrad_cpu(const Tensor& ds, const Tensor& x, const Tensor& key, double p,
                 const OptionalTensor& p_tensor, int64_t sample, int64_t row_offset,
                 int64_t col_offset) {
  constexpr const char* op = "lora_linear_wgrad";
  check_float(op, "x", x);
  check_wide(op, "ds", ds, x);
  const Rows shape = rows_of(x), inner = rows_of(ds);
  TORCH_CHECK_VALUE(x.dim() >= 1 && inner.rows == shape.rows, op, ": x must have the ", inner.rows,
                    " rows of ds, got ", x.sizes());
  const KeyedStream stream = mask_stream(op, key, x.device(), shape.rows, shape.cols, kInputDropout,
                                         sample, row_offset, col_offset);
  const Rate rate = cpu_rate(op, p, p_tensor);
  const NoAutocast no_autocast;
  const Tensor g = ds.reshape({inner.rows, inner.cols}), matrix = matrix_of(x);
  if (narrow(x, inner.cols, shape.cols)) return wgrad_narrow(g, matrix, stream, rate, at::kFloat);
  return at::mm(g.t(), wide_dropped(matrix, stream, rate)).contiguous();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float "
      "scaling, Tensor key, float p, Tensor? p_tensor, SymInt sample, SymInt row_offset, SymInt "
      "col_offset) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_down(Tensor x, Tensor lora_a, Tensor key, float p, Tensor? p_tensor, SymInt "
      "sample, SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_dgrad(Tensor grad, Tensor weight, Tensor ds, Tensor lora_a, Tensor key, float "
      "p, Tensor? p_tensor, SymInt sample, SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_wgrad(Tensor ds, Tensor x, Tensor key, float p, Tensor? p_tensor, SymInt "
      "sample, SymInt row_offset, SymInt col_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("lora_linear", lora_linear_cpu);
  m.impl("lora_linear_down", down_cpu);
  m.impl("lora_linear_dgrad", dgrad_cpu);
  m.impl("lora_linear_wgrad", wgrad_cpu);
}

}  // namespace randfuse
