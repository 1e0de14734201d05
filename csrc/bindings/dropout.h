// What the bindings of other ops use of dropout.
#pragma once
#include "checks.h"

namespace randfuse {

// y = D(x) on all threads; (rows, cols), y contiguous and possibly x itself.
void drop_rows_cpu(const Tensor& x, const Tensor& y, const MaskStream& stream, const Rate& rate);

}  // namespace randfuse
