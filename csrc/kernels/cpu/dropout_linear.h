// The three products of a dropped input with a narrow weight (N up to kMaxNarrow):
//
//   forward  Y (M,N) = scale * mask(X) W^T + bias      dgrad  dX (M,K) = scale * mask(G W)
//   wgrad    dW (N,K) = scale * G^T mask(X)
//
// With N small a product costs little more than reading X (or writing dX) once: 2N flops against 4
// bytes. So X is masked in pieces of 64 columns that live in the L1 cache, and the library product,
// which would need a dropped copy of X, is not used. Wide weights keep the library (see
// bindings/dropout_linear.cpp).
//
// Operands that are read again and again are float32 and padded (pack_* below); sums run over 64
// elements in registers and over those partial sums in order, whatever the thread count, so results
// are deterministic and err less than one long chain. lora_linear uses the same products with Out =
// float, which keeps everything of the size of its rank in float32, and with dX added to what is
// there.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/streams.h"

namespace randfuse::cpu {

constexpr int64_t kMaxNarrow = 128;

template <class T, class Out = T>
struct DropoutLinearArgs {
  int64_t m, n, k;
  const T* x;             // (m, k); forward and wgrad
  int64_t x_stride;       // elements between rows of x
  const float* weight_t;  // from pack_weight_t; forward
  const float* weight;    // from pack_weight; dgrad
  const float* grad;      // (m, n), contiguous; dgrad and wgrad
  const T* bias;          // (n,) or null; forward
  Out* out;               // (m, n), (m, k) or (n, k), row-major
  bool accumulate;        // dgrad: add to out
  MaskStream stream;
  Rate rate;
};

int64_t padded_n(int64_t n);                      // row length of weight_t
int64_t padded_k(int64_t k, int64_t col_offset);  // row length of weight: whole mask groups

// weight_t (k, padded_n) = W^T, zeros in the padding; rows [k_begin, k_end).
template <class T>
void pack_weight_t(const T* weight, int64_t weight_stride, int64_t n, float* weight_t,
                   int64_t k_begin, int64_t k_end);
// weight (n, padded_k) = W, column 0 where its decision lies in its group, zeros around; rows
// [n_begin, n_end).
template <class T>
void pack_weight(const T* weight, int64_t weight_stride, int64_t k, int64_t col_offset,
                 float* packed, int64_t n_begin, int64_t n_end);

// Ranges: rows of X for forward and dgrad, 64-column groups of one row (padded_k / 64) for wgrad.
template <class T, class Out>  // T float, half_t, bfloat16_t; Out T or float
void dropout_linear(const DropoutLinearArgs<T, Out>& args, int64_t row_begin, int64_t row_end);
template <class T>
void dropout_linear_dgrad(const DropoutLinearArgs<T>& args, int64_t row_begin, int64_t row_end);
template <class T, class Out>
void dropout_linear_wgrad(const DropoutLinearArgs<T, Out>& args, int64_t group_begin,
                          int64_t group_end);

}  // namespace randfuse::cpu
