// hadamard_transform: schema, checks, one or two passes.
#include "../kernels/cpu/hadamard_transform.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"

namespace randfuse {
namespace {

constexpr int64_t kLongest = int64_t{1} << 24;

// y = scale * H x along the middle of (outer, n, inner).
template <class T>
void pass(const T* x, T* y, int64_t outer, int64_t n, int64_t inner, double scale) {
  const cpu::HadamardArgs<T> args{x, y, outer, n, inner, static_cast<SumOf<T>>(scale)};
  parallel_groups(
      args.units(),
      [&](int64_t begin, int64_t end) { cpu::hadamard_transform<T>(args, begin, end); },
      std::max<int64_t>(1, cpu::kHadamardContiguous / (n * args.width())));
}

Tensor hadamard_transform_cpu(const Tensor& x, double scale, int64_t dim) {
  constexpr const char* op = "hadamard_transform";
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(0 <= dim && dim < x.dim(), op, ": dim must be in [0, ", x.dim(), "), got ",
                    dim);
  const int64_t n = x.size(dim);
  TORCH_CHECK_VALUE(n >= 1 && n <= kLongest && (n & (n - 1)) == 0, op,
                    ": x must have a power of two up to 2**24 elements along dim, got ", n);
  int64_t outer = 1, inner = 1;
  for (int64_t d = 0; d < dim; ++d) outer *= x.size(d);
  for (int64_t d = dim + 1; d < x.dim(); ++d) inner *= x.size(d);
  const int64_t longest = inner == 1 ? cpu::kHadamardContiguous : cpu::kHadamardStrided;
  // Between two passes nothing is rounded to 16 bits.
  const bool widen = n > longest && x.scalar_type() != at::kDouble;
  const Tensor source = widen ? x.to(at::kFloat).contiguous() : x.contiguous();
  const Tensor y = at::empty_like(source);
  if (y.numel() == 0) return y.to(x.scalar_type());
  dispatch_float(source, [&](auto type) {
    using T = decltype(type);
    if (n <= longest) return pass<T>(in<T>(source), out<T>(y), outer, n, inner, scale);
    const int64_t rest = n / longest;
    pass<T>(in<T>(source), out<T>(y), outer * rest, longest, inner, 1.0);
    pass<T>(out<T>(y), out<T>(y), outer, rest, longest * inner, scale);
  });
  return y.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def("hadamard_transform(Tensor x, float scale, int dim) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) { m.impl("hadamard_transform", hadamard_transform_cpu); }

}  // namespace randfuse
