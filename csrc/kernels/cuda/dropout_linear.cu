#include "dropout_linear.cuh"

#include <algorithm>

namespace randfuse::cuda {
namespace {

constexpr int64_t kMinLength = 256;  // elements of the contraction worth a block's start

// How many parts to cut `length` into so that tiles x parts fill the device. A part of length L
// reads 2L bytes per element of the other side and writes 4N bytes of partial sums for it: L >= 4N
// bounds that overhead by one half.
int64_t choose_splits(int64_t tiles, int64_t resident_blocks, int64_t length, int64_t n) {
  const int64_t longest = std::max<int64_t>(1, length / std::max(kMinLength, 4 * n));
  return std::clamp<int64_t>(resident_blocks / tiles, 1, longest);
}

// Cuts total_steps into equal parts, the last one shorter, none empty.
Plan cut(int64_t tiles, int64_t total_steps, int64_t splits) {
  Plan plan{};
  plan.tiles = tiles;
  plan.total_steps = static_cast<int>(total_steps);
  plan.steps = static_cast<int>(ceil_div(total_steps, splits));
  plan.splits = ceil_div(total_steps, plan.steps);
  return plan;
}

template <class Body>
auto with_tile(int64_t n, const Body& body) {  // calls body with N rounded up to a compiled width
  if (n <= 32) return body(std::integral_constant<int, 32>{});
  if (n <= 64) return body(std::integral_constant<int, 64>{});
  return body(std::integral_constant<int, 128>{});
}

// A launch shall have about as many blocks as run at once.
Plan make_plan(Product product, int64_t m, int64_t n, int64_t k, int64_t samples,
               int64_t col_offset, int64_t multiprocessors) {
  const int64_t cols = col_offset % kMaskLanes + k;  // from the start of a mask block
  return with_tile(n, [&](auto width) {
    constexpr int kN = decltype(width)::value;
    if (product == Product::kForward) {
      const int64_t tiles = ceil_div(m, kForwardRows);
      const int64_t resident = multiprocessors * kForwardResident<kN>;
      return cut(tiles, ceil_div(cols, kForwardCols), choose_splits(tiles, resident, cols, n));
    }
    if (product == Product::kDgrad) {
      const int64_t tiles = ceil_div(cols, kDgradCols);
      const int64_t resident =
          multiprocessors * (samples > 1 ? kDgradResident<kN, true> : kDgradResident<kN, false>);
      return cut(tiles, ceil_div(m, kDgradRows), std::max<int64_t>(1, resident / tiles));
    }
    const int64_t tiles = ceil_div(cols, Wgrad<kN>::kCols);
    const int64_t splits = choose_splits(tiles, multiprocessors, m * samples, n);
    return cut(tiles, ceil_div(m, Wgrad<kN>::kRows), splits);
  });
}

int64_t workspace_floats(Product product, const Plan& plan, int64_t m, int64_t n) {
  if (product == Product::kForward) return plan.splits > 1 ? plan.splits * m * n : 0;
  if (product == Product::kDgrad) return 0;
  const int64_t cols =
      with_tile(n, [](auto width) { return Wgrad<decltype(width)::value>::kCols; });
  return plan.splits * n * plan.tiles * cols;
}

template <class T>
cudaError_t sum_splits(const DropoutLinearArgs<T>& a, int64_t splits, int64_t rows, int64_t cols,
                       int64_t stride, int64_t shift, const T* bias, cudaStream_t stream) {
  return launch(sum_splits_kernel<T>, ceil_div(rows * cols, kThreads), kThreads, 0, stream,
                a.workspace, splits, rows, cols, stride, shift, a.rate, bias, a.out);
}

template <class T, int kN>
cudaError_t forward(const DropoutLinearArgs<T>& a, const Plan& plan, cudaStream_t stream) {
  const cudaError_t status = launch(dropout_linear_kernel<T, kN>, plan.tiles * plan.splits,
                                    kThreads, kForwardShared<kN>, stream, a, plan);
  if (status != cudaSuccess || plan.splits == 1) return status;
  return sum_splits(a, plan.splits, a.m, a.n, a.n, 0, a.bias, stream);
}

template <class T, int kN>
cudaError_t dgrad(const DropoutLinearArgs<T>& a, const Plan& plan, cudaStream_t stream) {
  const auto kernel = a.samples > 1 ? dropout_linear_dgrad_kernel<T, kN, true>
                                    : dropout_linear_dgrad_kernel<T, kN, false>;
  return launch(kernel, plan.tiles * plan.splits, kThreads, kDgradShared<kN>, stream, a, plan);
}

template <class T, int kN>
cudaError_t wgrad(const DropoutLinearArgs<T>& a, const Plan& plan, cudaStream_t stream) {
  const auto kernel = a.samples > 1 ? dropout_linear_wgrad_kernel<T, kN, true>
                                    : dropout_linear_wgrad_kernel<T, kN, false>;
  const cudaError_t status =
      launch(kernel, plan.tiles * plan.splits, kThreads, kWgradShared<kN>, stream, a, plan);
  if (status != cudaSuccess) return status;
  return sum_splits(a, plan.splits, a.n, a.k, plan.tiles * Wgrad<kN>::kCols,
                    a.stream.col_offset % kMaskLanes, static_cast<const T*>(nullptr), stream);
}

}  // namespace

cudaError_t dropout_linear_workspace(Product product, int64_t m, int64_t n, int64_t k,
                                     int64_t samples, int64_t col_offset, int64_t* floats) {
  *floats = 0;
  if (m == 0 || n == 0 || k == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t status = multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  const Plan plan = make_plan(product, m, n, k, samples, col_offset, multiprocessors);
  *floats = workspace_floats(product, plan, m, n);
  return cudaSuccess;
}

template <class T>
cudaError_t launch_dropout_linear(Product product, const DropoutLinearArgs<T>& a,
                                  cudaStream_t stream) {
  if (a.m == 0 || a.n == 0 || a.k == 0) return cudaErrorInvalidValue;  // no product to compute
  if (a.n > kMaxN || a.samples < 1) return cudaErrorInvalidValue;
  if (a.samples > 1 && product == Product::kForward) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  const cudaError_t status = multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  Plan plan = make_plan(product, a.m, a.n, a.k, a.samples, a.stream.col_offset, multiprocessors);
  const int64_t shift = a.stream.col_offset % kMaskLanes;
  plan.x_aligned = aligned(a.x, a.k, a.x_stride, shift);
  plan.weight_aligned = aligned(a.weight, a.k, a.weight_stride, shift);
  plan.grad_aligned = aligned(a.grad, a.n, a.grad_stride) && a.grad_sample_stride % kMaskLanes == 0;
  plan.out_aligned = aligned(a.out, a.k, a.k, shift);
  return with_tile(a.n, [&](auto width) {
    constexpr int kN = decltype(width)::value;
    switch (product) {
      case Product::kForward:
        return forward<T, kN>(a, plan, stream);
      case Product::kDgrad:
        return dgrad<T, kN>(a, plan, stream);
      default:
        return wgrad<T, kN>(a, plan, stream);
    }
  });
}

template cudaError_t launch_dropout_linear(Product, const DropoutLinearArgs<half_t>&, cudaStream_t);
template cudaError_t launch_dropout_linear(Product, const DropoutLinearArgs<bfloat16_t>&,
                                           cudaStream_t);

}  // namespace randfuse::cuda
