// Verification of drafted tokens: the tokens of kernels/cpu/speculative_accept.h, which has the
// modes and their bytes. Values in device memory cannot be refused: temperatures and filters are
// clamped as in categorical_sample.h (a NaN draft temperature stands for the temperature), counts
// and offsets of rows to what there is, and ids of a map that are no token are skipped.
#pragma once
#include <cuda_runtime_api.h>

#include "logits.h"

namespace randfuse::cuda {

enum class AcceptMode { kToken, kBlock, kMatch, kTypical };

inline constexpr int64_t kNaN = 1, kPosInf = 2, kNoSupport = 4, kBadId = 8;  // of the status

template <class T>
struct AcceptArgs {
  LogitRows<T> target;  // (B, K + 1) rows, or packed ones
  LogitRows<T> draft;   // (B, K) rows; logits null: one-hot
  // Elements from the first row of a request to that of the next; packed rows have one stride.
  int64_t target_step, draft_step;
  ColumnMap columns;          // of the draft's rows
  int64_t requests, drafts;   // B, K
  const int64_t* cu_rows;     // (B + 1,); null: K + 1 rows each
  const int64_t* num_drafts;  // (B,); null: as many as there are
  const int64_t* tokens_in;   // (B, K)
  const int64_t* keys;        // (G,)
  int64_t requests_per_key;
  const int64_t* positions;  // (B,) or null
  PerRow<double> temperature, draft_temperature;
  PerRow<int64_t> top_k;
  PerRow<double> top_p, min_p;
  bool filters;                          // some request may have one
  const double *target_lse, *draft_lse;  // a value a row; null or not finite: not known
  AcceptMode mode;
  double typical_threshold, typical_alpha;
  // (B, K + 2) words that are zero, with which tiles of rows after a rejection are left out; null:
  // all are read. The results are the same.
  uint32_t* words;
  int warps = 12;   // of the block that verifies a request, up to 12; the results are the same
  int64_t* tokens;  // (B, K + 1)
  int64_t* num_accepted;
  float* logprobs;  // (B, K + 1)
  int64_t* status;

  RF_HD bool ratio() const { return mode == AcceptMode::kToken || mode == AcceptMode::kBlock; }
  RF_HD bool saved_target() const { return target_lse && mode != AcceptMode::kTypical; }
  // Whose rows the first launch reads: those that nothing was saved of.
  RF_HD bool target_ahead() const { return !saved_target() || mode == AcceptMode::kMatch; }
  RF_HD bool draft_ahead() const { return draft.logits && ratio() && !draft_lse; }
  RF_HD int sides() const { return target_ahead() + draft_ahead(); }
};

// Device memory that a call needs: 32 bytes a tile of every row, 16 more in mode match.
template <class T>
size_t accept_workspace(const AcceptArgs<T>& args);

// Whether words pay: tiles of one place of all requests keep the device busy for a while.
template <class T>
cudaError_t accept_wants_words(const AcceptArgs<T>& args, bool* wanted);

template <class T>  // float, half_t, bfloat16_t; asynchronous and deterministic
cudaError_t launch_speculative_accept(const AcceptArgs<T>& args, void* workspace,
                                      cudaStream_t stream);

}  // namespace randfuse::cuda
