namespace randfuse::RF_ISA {
#include "simd.h"
// mask_rows.h builds on simd.h
#include "mask_rows.h"

// Walks out = f(first, second or null) by groups: full(first, second, out, keep) sees 64 elements
// each.
template <class T, class Full>
inline void two_operands(const cpu::ActDropoutArgs<T>& a, const T* first, const T* second,
                         int64_t begin, int64_t end, Full&& full) {
  for_each_group(a.stream, a.cols, a.rate.threshold, begin, end,
                 [&](int64_t r, int64_t c, int skip, int n, const Keep& keep) {
                   T buffer[3][kGroup] = {};
                   const int64_t at = r * a.cols + c;
                   const T* one = whole_group(first + at, buffer[0], skip, n);
                   const T* two = whole_group(second ? second + at : nullptr, buffer[1], skip, n);
                   T* out = n == kGroup ? a.out + at : buffer[2];
                   full(one, two, out, keep);
                   if (n != kGroup) std::memcpy(a.out + at, out + skip, n * sizeof(T));
                 });
}

template <class T>
void act_dropout(const cpu::ActDropoutArgs<T>& a, int64_t begin, int64_t end) {
  two_operands(
      a, a.z, a.residual, begin, end, [&](const T* z, const T* residual, T* y, const Keep& keep) {
        if constexpr (std::is_same_v<T, double>) {
          const uint64_t bits = keep_bits(keep);
          for (int l = 0; l < kGroup; ++l) {
            const double value = a.relu && z[l] <= 0.0 ? 0.0 : z[l];
            y[l] = (bits >> l & 1 ? value * a.rate.scale : 0.0) + (residual ? residual[l] : 0.0);
          }
        } else {
          const F32 scale = broadcast(static_cast<float>(a.rate.scale));
#pragma GCC unroll 16
          for (int v = 0; v < kGroup / kF32; ++v) {
            F32 value = load(z + v * kF32);
            if (a.relu) value = relu(value);
            value = kept(keep, v, mul(value, scale));
            if (residual) value = add(value, load(residual + v * kF32));
            store(y + v * kF32, value);
          }
        }
      });
}

template <class T>
void act_dropout_grad(const cpu::ActDropoutArgs<T>& a, int64_t begin, int64_t end) {
  two_operands(a, a.grad, a.relu ? a.z : nullptr, begin, end,
               [&](const T* grad, const T* z, T* dz, const Keep& keep) {
                 if constexpr (std::is_same_v<T, double>) {
                   const uint64_t bits = keep_bits(keep);
                   for (int l = 0; l < kGroup; ++l) {
                     const bool pass = (bits >> l & 1) && !(z && z[l] <= 0.0);
                     dz[l] = pass ? grad[l] * a.rate.scale : 0.0;
                   }
                 } else {
                   const F32 scale = broadcast(static_cast<float>(a.rate.scale));
#pragma GCC unroll 16
                   for (int v = 0; v < kGroup / kF32; ++v) {
                     F32 value = kept(keep, v, mul(load(grad + v * kF32), scale));
                     if (z) value = relu_grad(value, load(z + v * kF32));
                     store(dz + v * kF32, value);
                   }
                 }
               });
}

}  // namespace randfuse::RF_ISA
