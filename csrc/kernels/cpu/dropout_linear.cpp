#include "dropout_linear.h"

#define RF_IMPL "dropout_linear_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

int64_t padded_n(int64_t n) {
  return (n + baseline::kPanel - 1) / baseline::kPanel * baseline::kPanel;
}

int64_t padded_k(int64_t k, int64_t col_offset) {
  return baseline::groups_per_row(k, col_offset) * baseline::kGroup;
}

template <class T>
void pack_weight_t(const T* weight, int64_t weight_stride, int64_t n, float* weight_t,
                   int64_t k_begin, int64_t k_end) {
  const int64_t width = padded_n(n);
  constexpr int64_t kBlock = 64;  // columns of W that stay in cache while their rows are walked
  for (int64_t k0 = k_begin; k0 < k_end; k0 += kBlock) {
    const int64_t k1 = k0 + kBlock < k_end ? k0 + kBlock : k_end;
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t k = k0; k < k1; ++k) {
        weight_t[k * width + j] = j < n ? to_float(weight[j * weight_stride + k]) : 0.0f;
      }
    }
  }
}

template <class T>
void pack_weight(const T* weight, int64_t weight_stride, int64_t k, int64_t col_offset,
                 float* packed, int64_t n_begin, int64_t n_end) {
  const int64_t width = padded_k(k, col_offset), front = col_offset % baseline::kGroup;
  for (int64_t n = n_begin; n < n_end; ++n) {
    float* row = packed + n * width;
    for (int64_t c = 0; c < front; ++c) row[c] = 0.0f;
    for (int64_t c = 0; c < k; ++c) row[front + c] = to_float(weight[n * weight_stride + c]);
    for (int64_t c = front + k; c < width; ++c) row[c] = 0.0f;
  }
}

template <class T, class Out>
void dropout_linear(const DropoutLinearArgs<T, Out>& args, int64_t row_begin, int64_t row_end) {
  RF_DISPATCH(dropout_linear<T, Out>)(args, row_begin, row_end);
}

template <class T>
void dropout_linear_dgrad(const DropoutLinearArgs<T>& args, int64_t row_begin, int64_t row_end) {
  RF_DISPATCH(dropout_linear_dgrad<T>)(args, row_begin, row_end);
}

template <class T, class Out>
void dropout_linear_wgrad(const DropoutLinearArgs<T, Out>& args, int64_t group_begin,
                          int64_t group_end) {
  RF_DISPATCH(dropout_linear_wgrad<T, Out>)(args, group_begin, group_end);
}

#define RF_INSTANTIATE(T)                                                                   \
  template void pack_weight_t(const T*, int64_t, int64_t, float*, int64_t, int64_t);        \
  template void pack_weight(const T*, int64_t, int64_t, int64_t, float*, int64_t, int64_t); \
  template void dropout_linear_dgrad(const DropoutLinearArgs<T>&, int64_t, int64_t);
RF_INSTANTIATE(float)
RF_INSTANTIATE(half_t)
RF_INSTANTIATE(bfloat16_t)
#undef RF_INSTANTIATE

#define RF_INSTANTIATE(...)                                                              \
  template void dropout_linear(const DropoutLinearArgs<__VA_ARGS__>&, int64_t, int64_t); \
  template void dropout_linear_wgrad(const DropoutLinearArgs<__VA_ARGS__>&, int64_t, int64_t);
RF_INSTANTIATE(float)
RF_INSTANTIATE(half_t)
RF_INSTANTIATE(bfloat16_t)
RF_INSTANTIATE(half_t, float)
RF_INSTANTIATE(bfloat16_t, float)
#undef RF_INSTANTIATE

}  // namespace randfuse::cpu
