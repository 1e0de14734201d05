#include "dense_sketch.h"

#include <vector>

#include "../common/normal.h"

#define RF_IMPL "dense_sketch_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

namespace {
template <class Sum>
struct Scratch {
  std::vector<float> tile = std::vector<float>(kTileRows * kTileCols);
  std::vector<Sum> panel = std::vector<Sum>(kTileCols * kPanelBytes / sizeof(Sum));
};
}  // namespace

template <class T>
void dense_sketch(const DenseSketchArgs<T>& args, int64_t begin, int64_t end) {
  Scratch<SumOf<T>> s;
  RF_DISPATCH(dense_sketch<T>)(args, s.tile.data(), s.panel.data(), begin, end);
}
template <class Sum>
void dense_sketch_adjoint(const DenseSketchArgs<Sum>& args, int64_t begin, int64_t end) {
  Scratch<Sum> s;
  RF_DISPATCH(dense_sketch_adjoint<Sum>)(args, s.tile.data(), s.panel.data(), begin, end);
}
template void dense_sketch(const DenseSketchArgs<float>&, int64_t, int64_t);
template void dense_sketch(const DenseSketchArgs<half_t>&, int64_t, int64_t);
template void dense_sketch(const DenseSketchArgs<bfloat16_t>&, int64_t, int64_t);
template void dense_sketch(const DenseSketchArgs<double>&, int64_t, int64_t);
template void dense_sketch_adjoint(const DenseSketchArgs<float>&, int64_t, int64_t);
template void dense_sketch_adjoint(const DenseSketchArgs<double>&, int64_t, int64_t);

void dense_sketch_entries(const DenseEntriesArgs& args, int64_t begin, int64_t end) {
  RF_DISPATCH(dense_sketch_entries)(args, begin, end);
}

}  // namespace randfuse::cpu
