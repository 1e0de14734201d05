#include "linear_dropout.h"

#define RF_IMPL "linear_dropout_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

template <class T>
void act_dropout(const ActDropoutArgs<T>& args, int64_t group_begin, int64_t group_end) {
  RF_DISPATCH(act_dropout<T>)(args, group_begin, group_end);
}

template <class T>
void act_dropout_grad(const ActDropoutArgs<T>& args, int64_t group_begin, int64_t group_end) {
  RF_DISPATCH(act_dropout_grad<T>)(args, group_begin, group_end);
}

#define RF_INSTANTIATE(T)                                                \
  template void act_dropout(const ActDropoutArgs<T>&, int64_t, int64_t); \
  template void act_dropout_grad(const ActDropoutArgs<T>&, int64_t, int64_t);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(half_t)
RF_INSTANTIATE(bfloat16_t)
#undef RF_INSTANTIATE

}  // namespace randfuse::cpu
