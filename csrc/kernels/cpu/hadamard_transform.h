// y = scale * H x along the middle axis of (outer, n, inner); H[i][j] = (-1)^popcount(i & j), the
// order of Sylvester: H_2n = [H_n H_n; H_n -H_n].
//
// Bytes: one read and one write while a tile of whole transforms fits the L2 cache, n <= 2^16 where
// inner is 1 and n <= 2^12 elsewhere; beyond, H_{ab} = (H_a x I)(I x H_b) makes two passes of it.
// n log2 n additions: log2 of a register's lanes inside registers, the rest between them, up to
// four levels a pass over the tile. Each sum is taken in the same order whatever the instruction
// set.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/sketch.h"

namespace randfuse::cpu {

inline constexpr int64_t kHadamardContiguous = int64_t{1} << 16;  // longest n of one pass
inline constexpr int64_t kHadamardStrided = int64_t{1} << 12;

template <class T>
struct HadamardArgs {
  const T* x;  // (outer, n, inner), contiguous
  T* y;        // the same; may be x
  int64_t outer, n, inner;
  SumOf<T> scale;
  int64_t strips() const { return (inner + width() - 1) / width(); }  // per outer index
  int64_t width() const {  // columns in a tile: whole cache lines of them, 256 KiB in all
    const int64_t most = kHadamardContiguous / n < 256 ? kHadamardContiguous / n : 256;
    return most < inner ? most : inner;
  }
  int64_t units() const { return outer * strips(); }
};

template <class T>
void hadamard_transform(const HadamardArgs<T>& args, int64_t unit_begin, int64_t unit_end);

}  // namespace randfuse::cpu
