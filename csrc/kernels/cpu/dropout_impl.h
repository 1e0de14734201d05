namespace randfuse::RF_ISA {
#include "simd.h"
// mask_rows.h builds on simd.h
#include "mask_rows.h"

template <class T>
void dropout(const cpu::DropoutArgs<T>& a, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<T, double>) {
    for_each_group(a.stream, a.cols, a.rate.threshold, begin, end,
                   [&](int64_t r, int64_t c, int skip, int n, const Keep& keep) {
                     const uint64_t bits = keep_bits(keep) >> skip;
                     const double* x = a.x + r * a.x_stride + c;
                     double* y = a.y + r * a.cols + c;
                     for (int l = 0; l < n; ++l) y[l] = bits >> l & 1 ? x[l] * a.rate.scale : 0.0;
                   });
  } else {
    const F32 scale = broadcast(static_cast<float>(a.rate.scale));
    for_each_group(a.stream, a.cols, a.rate.threshold, begin, end,
                   [&](int64_t r, int64_t c, int skip, int n, const Keep& keep) {
                     on_group(a.x + r * a.x_stride + c, a.y + r * a.cols + c, skip, n,
                              [&](const T* in, T* out) { drop(keep, in, out, scale); });
                   });
  }
}

inline void dropout_mask(const cpu::DropoutMaskArgs& a, int64_t begin, int64_t end) {
  for_each_group(a.stream, a.cols, a.rate.threshold, begin, end,
                 [&](int64_t r, int64_t c, int skip, int n, const Keep& keep) {
                   bool* mask = a.mask + r * a.cols + c;
                   if (n == kGroup) return store_bools(mask, keep);
                   const uint64_t bits = keep_bits(keep) >> skip;
                   for (int l = 0; l < n; ++l) mask[l] = bits >> l & 1;
                 });
}

}  // namespace randfuse::RF_ISA
