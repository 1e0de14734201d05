// Epilogue of a linear layer and its derivative:
//
//   y = residual + D(relu?(z))          dz = D(grad), where z <= 0 (relu) 0
//
// One read of each operand, one write. GELU and SiLU are the library's elementwise kernels, run
// before (or after) this pass: their vectorised erf and exp are not worth a second copy. A 16-bit
// result of theirs is rounded once more than the other activations', as in eager.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/streams.h"

namespace randfuse::cpu {

template <class T>
struct ActDropoutArgs {
  const T* z;         // (rows, cols), row-major; backward: null unless relu
  const T* residual;  // (rows, cols), row-major, or null; forward
  const T* grad;      // (rows, cols), row-major; backward
  T* out;             // (rows, cols), row-major; may be z or grad
  int64_t cols;
  bool relu;
  MaskStream stream;
  Rate rate;
};

// Ranges are over the 64-column groups of the matrix, as in dropout.h.
template <class T>  // float, double, half_t, bfloat16_t
void act_dropout(const ActDropoutArgs<T>& args, int64_t group_begin, int64_t group_end);
template <class T>
void act_dropout_grad(const ActDropoutArgs<T>& args, int64_t group_begin, int64_t group_end);

}  // namespace randfuse::cpu
