#include "mixout_linear.h"

#define RF_IMPL "mixout_linear_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

template <class T>
void mixout(const MixoutArgs<T>& args, int64_t group_begin, int64_t group_end) {
  RF_DISPATCH(mixout<T>)(args, group_begin, group_end);
}
template void mixout(const MixoutArgs<float>&, int64_t, int64_t);
template void mixout(const MixoutArgs<double>&, int64_t, int64_t);
template void mixout(const MixoutArgs<half_t>&, int64_t, int64_t);
template void mixout(const MixoutArgs<bfloat16_t>&, int64_t, int64_t);

}  // namespace randfuse::cpu
