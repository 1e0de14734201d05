#include "dropout.h"

#define RF_IMPL "dropout_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

int64_t mask_groups(int64_t rows, int64_t cols, int64_t col_offset) {
  return rows * baseline::groups_per_row(cols, col_offset);
}

template <class T>
void dropout(const DropoutArgs<T>& args, int64_t group_begin, int64_t group_end) {
  RF_DISPATCH(dropout<T>)(args, group_begin, group_end);
}
template void dropout(const DropoutArgs<float>&, int64_t, int64_t);
template void dropout(const DropoutArgs<double>&, int64_t, int64_t);
template void dropout(const DropoutArgs<half_t>&, int64_t, int64_t);
template void dropout(const DropoutArgs<bfloat16_t>&, int64_t, int64_t);

void dropout_mask(const DropoutMaskArgs& args, int64_t group_begin, int64_t group_end) {
  RF_DISPATCH(dropout_mask)(args, group_begin, group_end);
}

}  // namespace randfuse::cpu
