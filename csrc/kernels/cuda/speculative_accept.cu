#include "speculative_accept.cuh"

namespace randfuse::cuda {

template <class T>
size_t accept_workspace(const AcceptArgs<T>& a) {
  return AcceptWorkspace<T>(a, nullptr).bytes;
}

template <class T>
cudaError_t accept_wants_words(const AcceptArgs<T>& a, bool* wanted) {
  // Warps of one place that are as many as the device holds: the next place then begins when the
  // verdicts of this one come in.
  int multiprocessors = 0;
  const cudaError_t status = multiprocessor_count(&multiprocessors);
  *wanted = a.mode != AcceptMode::kBlock && !a.filters && a.drafts > 0 &&
            a.requests * a.sides() * a.target.tiles() >= int64_t{16} * multiprocessors;
  return status;
}

template <class T>
cudaError_t launch_speculative_accept(const AcceptArgs<T>& a, void* workspace,
                                      cudaStream_t stream) {
  if (a.requests == 0) return cudaSuccess;
  const AcceptWorkspace<T> w(a, workspace);
  const int64_t rows = a.requests * (a.drafts + 1);
  const auto read = [&](int sides, bool again) {
    const auto kernel = a.mode == AcceptMode::kMatch     ? accept_stats_kernel<T, Read::kRace>
                        : a.mode == AcceptMode::kTypical ? accept_stats_kernel<T, Read::kDots>
                                                         : accept_stats_kernel<T, Read::kSums>;
    const int64_t blocks = rows * sides * ceil_div(a.target.tiles(), kWarps);
    return launch(kernel, blocks, kThreads, sizeof(uint32_t), stream, a, w, sides, again);
  };
  cudaError_t status = cudaSuccess;
  if (a.sides() > 0) status = read(a.sides(), false);
  if (status == cudaSuccess && a.filters) {
    status = launch(accept_cuts_kernel<T>, rows, kThreads, kAcceptCutShared, stream, a, w);
    if (status == cudaSuccess) status = read(1, true);
  }
  if (status != cudaSuccess) return status;
  const auto accept = [&](void (*kernel)(AcceptArgs<T>, AcceptWorkspace<T>)) {
    return launch(kernel, a.requests, 32 * a.warps, sizeof(TeamMemory<T>), stream, a, w);
  };
  if (a.mode == AcceptMode::kBlock && a.draft.logits) status = accept(accept_kernel<T, true>);
  return status == cudaSuccess ? accept(accept_kernel<T, false>) : status;
}

#define RF_INSTANTIATE(T)                                               \
  template size_t accept_workspace(const AcceptArgs<T>&);               \
  template cudaError_t accept_wants_words(const AcceptArgs<T>&, bool*); \
  template cudaError_t launch_speculative_accept(const AcceptArgs<T>&, void*, cudaStream_t)
RF_INSTANTIATE(float);
RF_INSTANTIATE(half_t);
RF_INSTANTIATE(bfloat16_t);
#undef RF_INSTANTIATE

}  // namespace randfuse::cuda
