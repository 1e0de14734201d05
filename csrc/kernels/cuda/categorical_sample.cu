#include "categorical_sample.cuh"

namespace randfuse::cuda {

template <class T>
size_t categorical_workspace(const CategoricalArgs<T>& a) {
  return Workspace<T>(a, nullptr).bytes;
}

template <class T>
cudaError_t launch_categorical_sample(const CategoricalArgs<T>& a, void* workspace,
                                      cudaStream_t stream) {
  if (a.count == 0) return cudaSuccess;
  const Workspace<T> w(a, workspace);
  const int64_t tile_blocks = ceil_div(a.count * a.logits.tiles(), kWarps);
  const auto run = [&](void (*kernel)(CategoricalArgs<T>, Workspace<T>), int64_t blocks,
                       size_t shared) {
    return launch(kernel, blocks, kThreads, shared, stream, a, w);
  };
  cudaError_t status = cudaSuccess;
  const bool facts = a.margin != nullptr;
  if (a.measures()) {
    status = run(facts ? tile_stats_kernel<T, true, false> : tile_stats_kernel<T, false, false>,
                 tile_blocks, 0);
  }
  if (status == cudaSuccess && a.filters) {
    status = run(find_cuts_kernel<T>, a.count, kCutShared);
    if (status == cudaSuccess) {
      status = run(facts ? tile_stats_kernel<T, true, true> : tile_stats_kernel<T, false, true>,
                   tile_blocks, 0);
    }
  }
  if (status == cudaSuccess && a.race) status = run(tile_race_kernel<T>, tile_blocks, 0);
  if (status != cudaSuccess) return status;
  return run(draw_kernel<T>, ceil_div(a.count * a.num_samples, kWarps), kDrawShared);
}

#define RF_INSTANTIATE(T)                                           \
  template size_t categorical_workspace(const CategoricalArgs<T>&); \
  template cudaError_t launch_categorical_sample(const CategoricalArgs<T>&, void*, cudaStream_t)
RF_INSTANTIATE(float);
RF_INSTANTIATE(half_t);
RF_INSTANTIATE(bfloat16_t);
#undef RF_INSTANTIATE

}  // namespace randfuse::cuda
