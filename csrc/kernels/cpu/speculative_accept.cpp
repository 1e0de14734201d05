#include "speculative_accept.h"

#include <memory>
#include <vector>

#define RF_IMPL "speculative_accept_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

template <class T, class Body>
static void with_scratch(int64_t drafts, const Body& body) {
  const std::unique_ptr<AcceptScratch<Wide<T>>> scratch(new AcceptScratch<Wide<T>>);  // not zeroed
  std::vector<BlockPlace<Wide<T>>> places(drafts + 1);
  Racer racer;
  scratch->target.racers = &racer;
  scratch->places = places.data();
  body(*scratch);
}

template <class T>
void speculative_accept(const AcceptArgs<T>& args, int64_t begin, int64_t end) {
  with_scratch<T>(args.drafts, [&](AcceptScratch<Wide<T>>& scratch) {
    RF_DISPATCH(speculative_accept<T>)(args, begin, end, scratch);
  });
}
template void speculative_accept(const AcceptArgs<float>&, int64_t, int64_t);
template void speculative_accept(const AcceptArgs<double>&, int64_t, int64_t);
template void speculative_accept(const AcceptArgs<half_t>&, int64_t, int64_t);
template void speculative_accept(const AcceptArgs<bfloat16_t>&, int64_t, int64_t);

template <class T>
void accept_stats(const AcceptArgs<T>& args, int64_t begin, int64_t end) {
  with_scratch<T>(args.drafts, [&](AcceptScratch<Wide<T>>& scratch) {
    RF_DISPATCH(accept_stats<T>)(args, begin, end, scratch);
  });
}
template void accept_stats(const AcceptArgs<float>&, int64_t, int64_t);
template void accept_stats(const AcceptArgs<double>&, int64_t, int64_t);
template void accept_stats(const AcceptArgs<half_t>&, int64_t, int64_t);
template void accept_stats(const AcceptArgs<bfloat16_t>&, int64_t, int64_t);

}  // namespace randfuse::cpu
