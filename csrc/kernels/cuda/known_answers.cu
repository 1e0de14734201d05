#include "known_answers.cuh"

namespace randfuse::cuda {

cudaError_t launch_known_answers(const KnownAnswerArgs& a, int64_t count, uint32_t* answers,
                                 cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return launch(known_answers_kernel, ceil_div(count, kThreads), kThreads, 0, stream, a, count,
                answers);
}

}  // namespace randfuse::cuda
