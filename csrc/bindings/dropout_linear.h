// What the bindings of other ops use of dropout_linear: matrices (rows, cols) with unit column
// stride, checked by the caller.
#pragma once
#include "checks.h"

namespace randfuse {

// Whether a product with a weight (n, k) is for the narrow kernels: masking in registers then beats
// a dropped copy and the library's product, which itself is compiled for more than our product
// knows; docs/measured.md, "Where dropout_linear stops being narrow". Empty operands are the
// library's.
bool narrow(const Tensor& x, int64_t n, int64_t k);

// Dropped copy of a matrix, for the products that the library does best.
Tensor dropped(const Tensor& x, const MaskStream& stream, const Rate& rate);

// D(x) weight^T + bias; dtype is float32 or x's, weight of any dtype.
Tensor forward_narrow(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const MaskStream& stream, const Rate& rate, at::ScalarType dtype);
// dx = D(grad weight), added to what is there if `accumulate`; the three may differ in dtype.
void dgrad_narrow(const Tensor& grad, const Tensor& weight, const Tensor& dx, bool accumulate,
                  const MaskStream& stream, const Rate& rate);
// grad^T D(x); dtype is float32 or x's, grad of any dtype.
Tensor wgrad_narrow(const Tensor& grad, const Tensor& x, const MaskStream& stream, const Rate& rate,
                    at::ScalarType dtype);

}  // namespace randfuse
