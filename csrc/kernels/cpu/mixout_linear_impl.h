namespace randfuse::RF_ISA {
#include "simd.h"
// mask_rows.h builds on simd.h
#include "mask_rows.h"

template <class T>
void mixout(const cpu::MixoutArgs<T>& m, int64_t begin, int64_t end) {
  for_each_group(m.stream, m.cols, m.rate.threshold, begin, end,
                 [&](int64_t r, int64_t c, int skip, int n, const Keep& keep) {
                   T buffer[3][kGroup] = {};
                   const T* w = whole_group(m.weight + r * m.weight_stride + c, buffer[0], skip, n);
                   const T* a = whole_group(m.anchor + r * m.anchor_stride + c, buffer[1], skip, n);
                   T* at = m.y + r * m.cols + c;
                   T* y = n == kGroup ? at : buffer[2];
                   if constexpr (std::is_same_v<T, double>) {
                     const uint64_t bits = keep_bits(keep);
                     for (int l = 0; l < kGroup; ++l) {
                       y[l] = a[l] + (bits >> l & 1 ? (w[l] - a[l]) * m.rate.scale : 0.0);
                     }
                   } else {
                     const F32 scale = broadcast(static_cast<float>(m.rate.scale));
#pragma GCC unroll 16
                     for (int v = 0; v < kGroup / kF32; ++v) {
                       const F32 anchor = load(a + v * kF32);
                       const F32 moved = mul(sub(load(w + v * kF32), anchor), scale);
                       store(y + v * kF32, add(anchor, kept(keep, v, moved)));
                     }
                   }
                   if (n != kGroup) std::memcpy(at, y + skip, n * sizeof(T));
                 });
}

}  // namespace randfuse::RF_ISA
