// Which of the compiled instruction-set variants runs.
#pragma once

namespace randfuse {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best one that this processor has, unless capped by RANDFUSE_ISA=baseline|avx2|avx512 or
// cap_isa().
Isa active_isa();
// Tests compare the variants with each other; returns the one now active.
Isa cap_isa(Isa most);
const char* isa_name(Isa isa);

}  // namespace randfuse

// Calls fn of the active variant: RF_DISPATCH(dropout)(args, begin, end); fn may hold commas.
#if defined(__x86_64__)
#define RF_DISPATCH(...)                                                                  \
  (::randfuse::active_isa() == ::randfuse::Isa::kAvx512 ? ::randfuse::avx512::__VA_ARGS__ \
   : ::randfuse::active_isa() == ::randfuse::Isa::kAvx2 ? ::randfuse::avx2::__VA_ARGS__   \
                                                        : ::randfuse::baseline::__VA_ARGS__)
#else
#define RF_DISPATCH(...) (::randfuse::baseline::__VA_ARGS__)
#endif
