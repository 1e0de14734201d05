// Raw logits of many rows on the device and what is done to them before a token is drawn. Shared by
// the ops that sample.
#pragma once
#include <cstdint>

#include "../common/categorical.h"
#include "../common/dtype.h"

namespace randfuse::cuda {

// A parameter that all rows share or that each row of the logits has. `otherwise` stands where
// there are no values: it was read on the host, or not given.
template <class V>
struct PerRow {
  const V* values;
  bool shared;
  V otherwise;

  RF_HD V at(int64_t row) const { return values == nullptr ? otherwise : values[shared ? 0 : row]; }
};

template <class T>
struct LogitRows {
  const T* logits;  // (rows, vocab)
  int64_t stride, rows, vocab;
  const T* uncond;  // (rows, vocab), may be null: no guidance
  int64_t uncond_stride;
  float scale_plus_one;
  const int64_t* exclude;  // (num_exclude,) ids of the whole vocabulary
  int64_t num_exclude;
  const int32_t* bitmask;  // (rows, bitmask_words), bit set = allowed; may be null
  int64_t bitmask_words;
  int64_t col_offset;  // id of the first token of a row; a multiple of 4

  RF_HD int tiles() const { return static_cast<int>((vocab + kTile - 1) / kTile); }
};

// The columns that mean token v are column[starts[v]], ..., column[starts[v + 1] - 1].
struct ColumnMap {
  const int64_t* starts;  // (V + 1,); null: column v is token v
  const int64_t* column;  // ascending within a token
};

struct Racer {
  double score;
  int64_t token;
};

}  // namespace randfuse::cuda
