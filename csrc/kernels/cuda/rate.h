// A drop probability for a kernel.
#pragma once
#include "../common/streams.h"

namespace randfuse::cuda {

struct RateSource {
  Rate rate;               // used unless device_p is given
  const double* device_p;  // on the device, read by the kernel: no host sync; clamped, NaN is 0
};

}  // namespace randfuse::cuda
