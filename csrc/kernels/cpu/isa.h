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

// Calls fn of the active variant: RF_DISPATCH(dropout)(args, begin, end).
#if defined(__x86_64__)
#define RF_DISPATCH(fn)                                                          \
  (::randfuse::active_isa() == ::randfuse::Isa::kAvx512 ? ::randfuse::avx512::fn \
   : ::randfuse::active_isa() == ::randfuse::Isa::kAvx2 ? ::randfuse::avx2::fn   \
                                                        : ::randfuse::baseline::fn)
#else
#define RF_DISPATCH(fn) (::randfuse::baseline::fn)
#endif
