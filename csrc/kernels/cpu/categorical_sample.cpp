#include "categorical_sample.h"

#include <memory>
#include <vector>

#define RF_IMPL "categorical_sample_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

template <class T>
void categorical_sample(const CategoricalArgs<T>& args, int64_t begin, int64_t end) {
  const std::unique_ptr<RowScratch<Wide<T>>> scratch(new RowScratch<Wide<T>>);  // not zeroed
  std::vector<Racer> racers(args.num_samples);
  scratch->racers = racers.data();
  RF_DISPATCH(categorical_sample<T>)(args, begin, end, *scratch);
}
template void categorical_sample(const CategoricalArgs<float>&, int64_t, int64_t);
template void categorical_sample(const CategoricalArgs<double>&, int64_t, int64_t);
template void categorical_sample(const CategoricalArgs<half_t>&, int64_t, int64_t);
template void categorical_sample(const CategoricalArgs<bfloat16_t>&, int64_t, int64_t);

}  // namespace randfuse::cpu
