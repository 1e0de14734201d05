// Tokens drawn from softmax(z / T), z raw logits with what LogitRows and the filters do to them:
// the tokens of kernels/cpu/categorical_sample.h. Values in device memory cannot be refused: a
// temperature that is negative or NaN counts as 0, others are clamped to their ranges, a NaN in
// top_p or min_p filters nothing, and a row id out of range gives token -1 and NaN.
#pragma once
#include <cuda_runtime_api.h>

#include "logits.h"

namespace randfuse::cuda {

template <class T>
struct CategoricalArgs {
  LogitRows<T> logits;
  const int64_t* chosen;  // (count,) rows of the logits; null: all, in order
  int64_t count;
  const int64_t* keys;  // (G,)
  int64_t rows_per_key, row_offset;
  PerRow<double> temperature;
  PerRow<int64_t> top_k;
  PerRow<double> top_p, min_p;
  bool filters;  // some row may have one
  int64_t num_samples;
  bool race;
  int64_t* tokens;  // (count, num_samples), ids of the whole vocabulary
  double* score;    // (count, num_samples) of a race, or null
  // Statistics of the law that is drawn from; all null or none.
  float *logprob, *log_odds;            // (count, num_samples)
  float *margin, *entropy, *logsumexp;  // (count,)

  RF_HD bool measures() const { return !race || filters || margin != nullptr; }
};

// Device memory that a call needs: 32 bytes a tile, 16 a tile and draw of a race.
template <class T>
size_t categorical_workspace(const CategoricalArgs<T>& args);

template <class T>  // float, half_t, bfloat16_t; asynchronous and deterministic
cudaError_t launch_categorical_sample(const CategoricalArgs<T>& args, void* workspace,
                                      cudaStream_t stream);

}  // namespace randfuse::cuda
