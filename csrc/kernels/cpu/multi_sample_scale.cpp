#include "multi_sample_scale.h"

#define RF_IMPL "multi_sample_scale_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

CountRule count_rule(uint32_t drop_threshold, int samples) {
  uint64_t table[kMaxCount + 1];
  CountRule rule{};
  rule.scale = count_table(drop_threshold, samples, table);
  for (int k = 0; k < samples; ++k) {
    if (table[k] == 0) {
      ++rule.always;
    } else if (table[k] >> 32 == 0) {
      rule.threshold[rule.thresholds++] = static_cast<uint32_t>(table[k]);
    }
  }
  return rule;
}

template <class T>
void multi_sample_scale(const MultiSampleScaleArgs<T>& args, int64_t group_begin,
                        int64_t group_end) {
  RF_DISPATCH(multi_sample_scale<T>)(args, group_begin, group_end);
}
template void multi_sample_scale(const MultiSampleScaleArgs<float>&, int64_t, int64_t);
template void multi_sample_scale(const MultiSampleScaleArgs<double>&, int64_t, int64_t);
template void multi_sample_scale(const MultiSampleScaleArgs<half_t>&, int64_t, int64_t);
template void multi_sample_scale(const MultiSampleScaleArgs<bfloat16_t>&, int64_t, int64_t);

}  // namespace randfuse::cpu
