#include "hadamard_transform.h"

#include <memory>

#define RF_IMPL "hadamard_transform_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

template <class T>
void hadamard_transform(const HadamardArgs<T>& args, int64_t begin, int64_t end) {
  // A tile, its columns rounded up to whole registers of at most 16 lanes.
  const int64_t width = args.inner == 1 ? 64 : (args.width() + 15) / 16 * 16;
  const int64_t size = args.inner == 1 && args.n > 64 ? args.n : args.n * width;
  const std::unique_ptr<SumOf<T>[]> buffer(new SumOf<T>[static_cast<size_t>(size)]);
  RF_DISPATCH(hadamard_transform<T>)(args, buffer.get(), begin, end);
}
template void hadamard_transform(const HadamardArgs<float>&, int64_t, int64_t);
template void hadamard_transform(const HadamardArgs<double>&, int64_t, int64_t);
template void hadamard_transform(const HadamardArgs<half_t>&, int64_t, int64_t);
template void hadamard_transform(const HadamardArgs<bfloat16_t>&, int64_t, int64_t);

}  // namespace randfuse::cpu
