// One pass of y = scale * H x along the middle axis of (outer, n, inner), both contiguous, for
// float, half_t and bfloat16_t and, between two passes, float on one side. H_ab = (H_a x I)(I x
// H_b) makes two passes of a long transform. Asynchronous.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace randfuse::cuda {

template <class In, class Out>
struct HadamardArgs {
  const In* x;
  Out* y;  // may be x
  int64_t outer, n, inner;
  float scale;
};

// Points of the first pass of n, a power of two up to 2^24; n where one pass is enough. What is
// left for the second never exceeds 2^12.
inline int64_t hadamard_first_pass(int64_t n, int64_t inner) {
  if (n <= (inner == 1 ? 1 << 15 : 1 << 12)) return n;
  if (inner == 1) return 1 << 13;
  int64_t half = 1;
  while (half * half < n) half *= 2;
  return half;
}

// Fewer columns than a sector has, or too few elements for a tile: moved to the end they are
// cheaper.
inline bool hadamard_strided(int64_t n, int64_t inner) { return inner >= 8 && n * inner >= 512; }

template <class In, class Out>
cudaError_t launch_hadamard_pass(const HadamardArgs<In, Out>& args, cudaStream_t stream);

}  // namespace randfuse::cuda
