#include "multi_sample_cross_entropy.h"

#include <limits>

#define RF_IMPL "multi_sample_cross_entropy_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

template <class T>
void cross_entropy_rows(const CrossEntropyArgs<T>& args, int64_t row_begin, int64_t row_end) {
  RF_DISPATCH(cross_entropy_rows<T>)(args, row_begin, row_end);
}

template <class T>
void cross_entropy_grad_rows(const CrossEntropyArgs<T>& args, int64_t row_begin, int64_t row_end) {
  RF_DISPATCH(cross_entropy_grad_rows<T>)(args, row_begin, row_end);
}

template void cross_entropy_rows(const CrossEntropyArgs<float>&, int64_t, int64_t);
template void cross_entropy_rows(const CrossEntropyArgs<double>&, int64_t, int64_t);
template void cross_entropy_grad_rows(const CrossEntropyArgs<float>&, int64_t, int64_t);
template void cross_entropy_grad_rows(const CrossEntropyArgs<double>&, int64_t, int64_t);

}  // namespace randfuse::cpu
