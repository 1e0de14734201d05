#include "dense_sketch.h"

#include "../common/normal.h"

#define RF_IMPL "dense_sketch_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

void dense_sketch_entries(const DenseEntriesArgs& args, int64_t begin, int64_t end) {
  RF_DISPATCH(dense_sketch_entries)(args, begin, end);
}

}  // namespace randfuse::cpu
