// Compiles the file RF_IMPL once per instruction set, into randfuse::baseline, ::avx2 and ::avx512:
//
//   #define RF_IMPL "dropout_impl.h"
//   #include "for_each_isa.h"
//
// Standard headers must be included before, so that no inline function of theirs is compiled for an
// instruction set that the running processor may lack.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/dtype.h"
#include "../common/streams.h"
#include "isa.h"

#define RF_BASELINE 0
#define RF_AVX2 1
#define RF_AVX512 2

#define RF_ISA baseline
#define RF_LEVEL RF_BASELINE
#include RF_IMPL
#undef RF_ISA
#undef RF_LEVEL

#if defined(__x86_64__)
#include <immintrin.h>

#define RF_ISA avx2
#define RF_LEVEL RF_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include RF_IMPL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef RF_ISA
#undef RF_LEVEL

#define RF_ISA avx512
#define RF_LEVEL RF_AVX512
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#include RF_IMPL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef RF_ISA
#undef RF_LEVEL
#endif
