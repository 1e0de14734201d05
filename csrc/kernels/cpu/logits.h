// Raw logits of many rows and what is done to them before a token is drawn. Shared by the ops that
// sample.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../common/categorical.h"
#include "../common/dtype.h"

namespace randfuse::cpu {

template <class T>  // type of the arithmetic on logits of type T
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Where rows of a tensor lie whose leading dimensions need not be one stride: no copy is made.
struct RowLayout {
  static constexpr int kMaxDims = 8;
  int dims;
  int64_t size[kMaxDims], stride[kMaxDims];

  int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int d = dims - 1; d >= 0; --d) {
      at += row % size[d] * stride[d];
      row /= size[d];
    }
    return at;
  }
};

template <class T>
struct LogitRows {
  const T* logits;
  RowLayout layout;
  int64_t vocab;
  const T* uncond;  // may be null: no guidance
  RowLayout uncond_layout;
  Wide<T> scale_plus_one;
  const int64_t* exclude;  // (num_exclude,), ascending ids of the whole vocabulary
  int64_t num_exclude;
  const int32_t* bitmask;  // (rows, bitmask_words), bit set = allowed; may be null
  int64_t bitmask_words;
  int64_t col_offset = 0;  // id of the first token of a row; a multiple of 4
  // Rows over another vocabulary: column[k] of a row is a logit of token[k], and a token may have
  // several or none. Null: column v is token v.
  const int64_t *token, *column;  // (num_columns,), token ascending
  int64_t num_columns;
};

// A parameter that all rows share or that each row of the logits has.
template <class V>
struct PerRow {
  const V* values;  // null: not given
  bool shared;

  V at(int64_t row, V otherwise) const {
    return values == nullptr ? otherwise : values[shared ? 0 : row];
  }
};

// A row as its measurement left it: token v has probability exp((z_v - max) / T) / total.
template <class Z>
struct RowLaw {
  Z max;
  double total;
  Cut<Z> cut;
  bool exact;
};

struct Racer {
  double score;
  int64_t token;
};

// What a thread works in: under 100 KiB, and 16 bytes a draw.
template <class Z>
struct RowScratch {
  TileStats<Z> tiles[kMaxTiles];
  double mass[kMaxTiles];  // of the tiles, relative to a token at the row's maximum
  Z buffer[kTile];
  double weights[kTile];
  double histogram[2048];
  Racer* racers;  // (num_samples,)
};

}  // namespace randfuse::cpu
