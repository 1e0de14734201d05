// The elementwise pass of linear_dropout.
//
//   y = residual + (keep ? act(z) * scale : 0)        dz = keep ? act'(z) * (grad * scale) : 0
//
// Floor: each operand is read once and the result written once, 6 bytes an element in bf16 with two
// operands. The library's product cannot take this epilogue, so z is written and read once more
// (4 bytes in bf16); the mask, the activation and the residual then cost nothing beyond that pass,
// which eager makes three times. Grid and loads: map_rows.cuh.
#pragma once
#include "linear_dropout.h"
#include "map_rows.cuh"

namespace randfuse::cuda {

template <Activation kAct>
RF_DEVICE float act(float z) {
  if constexpr (kAct == Activation::kRelu) return z > 0.0f || z != z ? z : 0.0f;  // NaN stays
  if constexpr (kAct == Activation::kGelu) return 0.5f * z * (1.0f + erff(z * 0.70710678f));
  if constexpr (kAct == Activation::kSilu) return z / (1.0f + expf(-z));
  return z;
}

// grad * act'(z). ReLU selects: an infinite grad is dropped at z < 0 and passes where z is NaN, as
// in eager.
template <Activation kAct>
RF_DEVICE float times_derivative(float grad, float z) {
  if constexpr (kAct == Activation::kRelu) return z <= 0.0f ? 0.0f : grad;
  if constexpr (kAct == Activation::kGelu) {  // Phi(z) + z phi(z)
    const float cdf = 0.5f * (1.0f + erff(z * 0.70710678f));
    return grad * (cdf + z * 0.39894228f * expf(-0.5f * z * z));
  }
  if constexpr (kAct == Activation::kSilu) {
    const float s = 1.0f / (1.0f + expf(-z));
    return grad * (s * (1.0f + z * (1.0f - s)));
  }
  return grad;
}

template <class T, Activation kAct, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMapBlocks) act_dropout_kernel(const MapParams<T> p) {
  map_rows<2, kAligned>(p, [](bool keep, float scale, float z, float residual) {
    return residual + (keep ? act<kAct>(z) * scale : 0.0f);
  });
}

template <class T, Activation kAct, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMapBlocks)
    act_dropout_grad_kernel(const MapParams<T> p) {
  map_rows<2, kAligned>(p, [](bool keep, float scale, float z, float grad) {
    return keep ? times_derivative<kAct>(grad * scale, z) : 0.0f;
  });
}

}  // namespace randfuse::cuda
