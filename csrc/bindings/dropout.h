// What the bindings of other ops use of dropout.
#pragma once
#include "checks.h"
#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/rate.h"
#endif

namespace randfuse {

// y = D(x) on all threads; (rows, cols), y contiguous and possibly x itself.
void drop_rows_cpu(const Tensor& x, const Tensor& y, const MaskStream& stream, const Rate& rate);

#ifdef RANDFUSE_CUDA
// The same on the current device and its current stream.
void drop_rows_cuda(const Tensor& x, const Tensor& y, const MaskStream& stream,
                    const cuda::RateSource& rate);
#endif

}  // namespace randfuse
