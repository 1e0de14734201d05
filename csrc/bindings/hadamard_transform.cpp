// hadamard_transform: schema, checks, one or two passes.
#include "../kernels/cpu/hadamard_transform.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"

#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/hadamard_transform.h"
#include "cuda.h"
#endif

namespace randfuse {
namespace {

constexpr const char* op = "hadamard_transform";
constexpr int64_t kLongest = int64_t{1} << 24;

struct Axis {  // x seen as (outer, n, inner)
  int64_t outer = 1, n, inner = 1;
};

Axis check_axis(const Tensor& x, int64_t dim) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(0 <= dim && dim < x.dim(), op, ": dim must be in [0, ", x.dim(), "), got ",
                    dim);
  Axis axis;
  axis.n = x.size(dim);
  TORCH_CHECK_VALUE(axis.n >= 1 && axis.n <= kLongest && (axis.n & (axis.n - 1)) == 0, op,
                    ": x must have a power of two up to 2**24 elements along dim, got ", axis.n);
  for (int64_t d = 0; d < dim; ++d) axis.outer *= x.size(d);
  for (int64_t d = dim + 1; d < x.dim(); ++d) axis.inner *= x.size(d);
  return axis;
}

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
  const auto [outer, n, inner] = check_axis(x, dim);
  const int64_t longest = inner == 1 ? cpu::kHadamardContiguous : cpu::kHadamardStrided;
  // Between two passes nothing is rounded to 16 bits.
  const bool widen = n > longest && x.scalar_type() != at::kDouble;
  const Tensor source = widen ? x.to(at::kFloat).contiguous() : x.contiguous();
  const Tensor y = at::empty_like(source);
  if (y.numel() == 0) return y.to(x.scalar_type());
  dispatch_float(source, [&, outer = outer, n = n, inner = inner](auto type) {
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

#ifdef RANDFUSE_CUDA

namespace {

Tensor hadamard_transform_cuda(const Tensor& x, double scale, int64_t dim) {
  const Axis axis = check_axis(x, dim);
  const CudaScope scope(x);
  if (axis.inner > 1 && !cuda::hadamard_strided(axis.n, axis.inner)) {
    const Tensor last = hadamard_transform_cuda(x.movedim(dim, -1), scale, x.dim() - 1);
    return last.movedim(-1, dim).contiguous();
  }
  const Tensor source = x.contiguous(), y = at::empty_like(source);
  if (y.numel() == 0) return y;
  const int64_t first = cuda::hadamard_first_pass(axis.n, axis.inner), rest = axis.n / first;
  dispatch_cuda_float(x, [&](auto type) {
    using T = decltype(type);
    const auto factor = static_cast<float>(scale);
    if (rest == 1) {
      const cuda::HadamardArgs<T, T> args{in<T>(source), out<T>(y),  axis.outer,
                                          axis.n,        axis.inner, factor};
      C10_CUDA_CHECK(cuda::launch_hadamard_pass(args, scope));
      return;
    }
    // Between two passes nothing is rounded to 16 bits.
    const bool wide = std::is_same_v<T, float>;
    const Tensor sums = wide ? y : at::empty(x.sizes(), x.options().dtype(at::kFloat));
    const cuda::HadamardArgs<T, float> low{in<T>(source), out<float>(sums), axis.outer * rest,
                                           first,         axis.inner,       1.0f};
    const cuda::HadamardArgs<float, T> high{in<float>(sums),    out<T>(y), axis.outer, rest,
                                            first * axis.inner, factor};
    C10_CUDA_CHECK(cuda::launch_hadamard_pass(low, scope));
    C10_CUDA_CHECK(cuda::launch_hadamard_pass(high, scope));
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(randfuse, CUDA, m) { m.impl("hadamard_transform", hadamard_transform_cuda); }

#endif  // RANDFUSE_CUDA

}  // namespace randfuse
