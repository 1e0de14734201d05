// A warp reads a tile of 1024 logits, 32 a lane, and the collectives that work on one.
//
// Loads: kRun tokens that follow one another are one load (two of fp32 where kRun is 8), a lane's
// four of 16 bytes are in flight at once: 64 KB per multiprocessor at 1024 threads, where HBM's
// latency asks for 30. A row may start anywhere (V = 50257): with kRun = 8 runs lie on 16-byte
// boundaries, the `head` tokens before the first and as many less than 8 after the last make up
// run 0, which one lane loads token by token. With kRun = 4 runs lie at multiples of 4 tokens, as
// Philox blocks do, and rows that are not aligned are loaded token by token.
#pragma once
#include "device.cuh"
#include "logits.h"

namespace randfuse::cuda {

inline constexpr int kWarps = kThreads / 32;
inline constexpr int kPerLane = kTile / 32;
inline constexpr unsigned kAll = ~0u;

template <class V>
RF_DEVICE V shuffle(V v, int source) {
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &v, sizeof v);
  for (uint32_t& w : words) w = __shfl_sync(kAll, w, source);
  memcpy(&v, words, sizeof v);
  return v;
}
template <class V>
RF_DEVICE V shuffle_xor(V v, int flip) {
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &v, sizeof v);
  for (uint32_t& w : words) w = __shfl_xor_sync(kAll, w, flip);
  memcpy(&v, words, sizeof v);
  return v;
}
RF_DEVICE float warp_max(float v) {  // NaN left out
  for (int flip = 16; flip > 0; flip /= 2) v = fmaxf(v, shuffle_xor(v, flip));
  return v;
}
template <class V>
RF_DEVICE V warp_sum(V v) {
  for (int flip = 16; flip > 0; flip /= 2) v += shuffle_xor(v, flip);
  return v;
}
template <class V>
RF_DEVICE V warp_min(V v) {
  for (int flip = 16; flip > 0; flip /= 2) {
    const V other = shuffle_xor(v, flip);
    v = other < v ? other : v;
  }
  return v;
}
RF_DEVICE int lowest_bit(uint32_t bits) {  // of bits != 0
  int at = 0;
  while (!(bits >> at & 1)) ++at;
  return at;
}
RF_DEVICE Cut<float> no_cut() { return {-INFINITY, kMaxVocab}; }

RF_DEVICE float widen(const float* p) { return *p; }
template <class T>
RF_DEVICE float widen(const T* p) {
  return load1(p);
}

template <int kBytes>
struct alignas(kBytes < 16 ? kBytes : 16) Run {
  uint32_t w[kBytes / 4];
};
template <int kRun>
RF_DEVICE void unpack_run(const Run<4 * kRun>& run, const float*, float* v) {
  memcpy(v, run.w, sizeof run);
}
template <int kRun, class T>
RF_DEVICE void unpack_run(const Run<2 * kRun>& run, const T*, float* v) {
  for (int e = 0; e < kRun; e += 2) unpack2<T>(run.w[e / 2], v[e], v[e + 1]);
}

// The registers of a lane, moved on by kBy: a loop that takes the first kBy of them and rotates
// needs no index known at compile time but 0 ... kBy - 1, and so neither 32 copies of its body nor
// memory.
template <int kBy, int kSize>
RF_DEVICE void rotate(float (&v)[kSize]) {
  float first[kBy];
#pragma unroll
  for (int k = 0; k < kBy; ++k) first[k] = v[k];
#pragma unroll
  for (int k = 0; k < kSize - kBy; ++k) v[k] = v[k + kBy];
#pragma unroll
  for (int k = 0; k < kBy; ++k) v[kSize - kBy + k] = first[k];
}

// The columns of a token add up at `temperature`.
template <class T>
RF_DEVICE float joined_columns(const T* row, const ColumnMap& columns, int64_t token,
                               double temperature) {
  float z = -INFINITY;
#pragma unroll 1
  for (int64_t c = columns.starts[token]; c < columns.starts[token + 1]; ++c)
    z = joined(z, widen(row + columns.column[c]), temperature);
  return z;
}

template <class T, int kRun>
struct WarpTile {
  static constexpr int kRuns = kPerLane / kRun;
  int n;     // tokens of the row in it
  int head;  // tokens before the first run
  float z[kPerLane];

  RF_DEVICE WarpTile(const LogitRows<T>& rows, int64_t row, int tile, const Cut<float>& cut) {
    const int64_t first = int64_t{tile} * kTile;
    n = static_cast<int>(rows.vocab - first < kTile ? rows.vocab - first : kTile);
    const T* logits = rows.logits + row * rows.stride + first;
    const unsigned past = reinterpret_cast<uintptr_t>(logits) % 16;
    head = kRun == 8 && past != 0 ? static_cast<int>((16 - past) / sizeof(T)) : 0;
    load<kRuns>(logits, 0, z);
    if (rows.uncond) {
      const T* uncond = rows.uncond + row * rows.uncond_stride + first;
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        float u[kRun];
        load<1>(uncond, i, u);
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          const int k = i * kRun + e;
          z[k] = token(k) < n ? guided(z[k], u[e], rows.scale_plus_one) : -INFINITY;
        }
      }
    }
    for (int64_t i = 0; i < rows.num_exclude; i += 32) drop_excluded(rows, first, i);
    if (rows.bitmask) {
      const int32_t* bits = rows.bitmask + row * rows.bitmask_words + first / 32;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const int t = token(k);
        if (t < n && !(bits[t / 32] >> (t % 32) & 1)) z[k] = -INFINITY;
      }
    }
    if (cut.value > -INFINITY) {
#pragma unroll
      for (int k = 0; k < kPerLane; ++k)
        z[k] = cut.keeps(z[k], first + token(k)) ? z[k] : -INFINITY;
    }
  }

  // Of a row over other columns.
  RF_DEVICE WarpTile(const LogitRows<T>& rows, int64_t row, int tile, const ColumnMap& columns,
                     double temperature)
      : head(0) {
    const int64_t first = int64_t{tile} * kTile;
    n = static_cast<int>(rows.vocab - first < kTile ? rows.vocab - first : kTile);
#pragma unroll 1
    for (int k = 0; k < kPerLane; ++k, rotate<1>(z)) {
      const int t = token(k);
      z[0] = t < n
                 ? joined_columns(rows.logits + row * rows.stride, columns, first + t, temperature)
                 : -INFINITY;
    }
  }

  // Place in the tile of the k-th logit; those from n on are -inf.
  RF_DEVICE int token(int k) const {
    const int run = threadIdx.x % 32 + k / kRun * 32, e = k % kRun;
    if (head == 0) return run * kRun + e;
    if (run > 0) return run * kRun + e + head - kRun;
    return e < head ? e : kTile - kRun + e;
  }

  // A token is left out.
  RF_DEVICE void drop(int token) {
    const int found = slot(token);
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) z[k] = k == found ? -INFINITY : z[k];
  }

  // The first token with this logit, which there is.
  RF_DEVICE int first_equal(float logit) const {
    int first = kTile;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) first = z[k] == logit ? min(first, token(k)) : first;
    return warp_min(first);
  }

  // The other way round: k, or -1 where another lane has the token.
  RF_DEVICE int slot(int token) const {
    int place = token;  // run * kRun + e
    if (head != 0) {
      place = token - head + kRun;
      if (token < head) place = token;
      if (place >= kTile) place -= kTile - head;
    }
    const int run = place / kRun;
    return run % 32 == static_cast<int>(threadIdx.x % 32) ? run / 32 * kRun + place % kRun : -1;
  }

 private:
  // Runs [begin, begin + kCount), all on their way before the first is used.
  template <int kCount>
  RF_DEVICE void load(const T* logits, int begin, float* v) const {
    constexpr int kBytes = kRun * sizeof(T);
    const bool aligned = reinterpret_cast<uintptr_t>(logits + head) % alignof(Run<kBytes>) == 0;
    Run<kBytes> runs[kCount];
    bool whole[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int t = token((begin + i) * kRun);
      whole[i] = aligned && t + kRun <= n && (head == 0 || t > 0);
      runs[i] = {};
      if (whole[i]) runs[i] = *reinterpret_cast<const Run<kBytes>*>(logits + t);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      unpack_run<kRun>(runs[i], logits, v + i * kRun);
      if (whole[i]) continue;
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        const int t = token((begin + i) * kRun + e);
        v[i * kRun + e] = t < n ? widen(logits + t) : -INFINITY;
      }
    }
  }

  RF_DEVICE void drop_excluded(const LogitRows<T>& rows, int64_t first, int64_t i) {
    const int64_t mine = i + threadIdx.x % 32;
    const int64_t id = mine < rows.num_exclude ? load_constant(rows.exclude + mine) : -1;
    const int64_t at = id - rows.col_offset - first;
    const bool inside = id >= 0 && 0 <= at && at < n;
    uint32_t hits = __ballot_sync(kAll, inside);
    for (int lane = 0; hits != 0; ++lane, hits >>= 1) {
      if (!(hits & 1)) continue;
      drop(shuffle(static_cast<int>(at), lane));
    }
  }
};

}  // namespace randfuse::cuda
