// The race of categorical_sample's method "race" and of speculative_accept's mode "match".
//
// Arithmetic per token: a quarter of a Philox block and 10 instructions, 34 where the bytes of a
// bf16 logit allow 12.
#pragma once
#include "logit_tiles.cuh"

namespace randfuse::cuda {

// What a race knows of its row.
struct RaceRow {
  bool greedy;
  double temperature;  // 1 where greedy
  uint64_t key;
  uint32_t stream_row;
};

// The greater score, of equal ones the lower token.
RF_DEVICE void keep_better(const Racer& other, Racer* best) {
  if (other.score > best->score || (other.score == best->score && other.token < best->token))
    *best = other;
}

// The race of a tile. E >= v >= w 2^-24, w the upper 24 bits, bounds a score from above; only
// tokens whose bound reaches the score of the one with the greatest bound are scored, in float64
// with all 64 bits (kernels/cpu/row_draws.h has the inequality and the slack).
template <class T>
class TileRace {
 public:
  RF_DEVICE TileRace(WarpTile<T, 4>& logits, const RaceRow& row, uint32_t first_block)
      : logits_(logits), row_(row), first_block_(first_block) {}

  RF_DEVICE Racer run(uint32_t draw, int64_t first) const {
    float bound[kPerLane];
    bounds(draw, bound);
    float top = -INFINITY;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) top = fmaxf(top, bound[k]);
    top = warp_max(top);
    Racer best{-INFINITY, 0};
    if (top == -INFINITY) return best;
    int leader = kTile;
#pragma unroll
    for (int k = kPerLane - 1; k >= 0; --k) leader = bound[k] == top ? logits_.token(k) : leader;
    leader = warp_min(leader);
    const int owner = leader % 128 / 4;
    if (static_cast<int>(threadIdx.x % 32) == owner) try_token(slot(leader), draw, first, &best);
    best.score = shuffle(best.score, owner);
    best.token = shuffle(best.token, owner);
    if (row_.greedy) return best;  // the first of the greatest
    const float reach = static_cast<float>(best.score - 0x1p-20 * (fabs(best.score) + 220.0));
    uint32_t left = 0;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k)
      left |= static_cast<uint32_t>(bound[k] >= reach && logits_.token(k) != leader) << k;
    while (left != 0) {
      const int k = lowest_bit(left);
      left &= left - 1;
      try_token(k, draw, first, &best);
    }
    for (int flip = 16; flip > 0; flip /= 2)
      keep_better({shuffle_xor(best.score, flip), shuffle_xor(best.token, flip)}, &best);
    return best;
  }

 private:
  RF_DEVICE static int slot(int token) { return token / 128 * 4 + token % 4; }

  RF_DEVICE void bounds(uint32_t draw, float (&bound)[kPerLane]) const {
    const float slope = static_cast<float>(1.0 / row_.temperature);
    const float per_bit = static_cast<float>(-0.6931471805599453 * 0x1p-23);
    const float at_zero = static_cast<float>(0.6931471805599453 * 151.0);
    // In halves: eight Philox blocks side by side would not fit the registers.
    constexpr int kHalf = kPerLane / 2;
#pragma unroll 1
    for (int half = 0; half < 2; ++half, rotate<kHalf>(bound), rotate<kHalf>(logits_.z)) {
#pragma unroll
      for (int k = 0; k < kHalf; k += 4) {
        const Words words = words_of((half * kHalf + k) / 4, race_high_domain(), draw);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float z = logits_.z[k + e], w = static_cast<float>(words.r[e] >> 8);
          int32_t bits;
          memcpy(&bits, &w, sizeof bits);
          const float score = fmaf(static_cast<float>(bits), per_bit, fmaf(z, slope, at_zero));
          bound[k + e] = row_.greedy ? z : score;
        }
      }
    }
  }

  RF_DEVICE static uint32_t word(const Words& w, int e) {  // an index would put w into memory
    const uint32_t low = e == 0 ? w.r[0] : w.r[1], high = e == 2 ? w.r[2] : w.r[3];
    return e < 2 ? low : high;
  }

  RF_DEVICE Words words_of(int q, uint32_t domain, uint32_t draw) const {
    const uint32_t j = first_block_ + threadIdx.x % 32 + 32 * q;
    return block<kWordRounds>(row_.key, row_.stream_row, j, draw, domain);
  }

  RF_DEVICE void try_token(int k, uint32_t draw, int64_t first, Racer* best) const {
    float z = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) z = i == k ? logits_.z[i] : z;
    double score = z;
    if (!row_.greedy) {
      const uint32_t high = word(words_of(k / 4, race_high_domain(), draw), k % 4);
      const uint32_t low = word(words_of(k / 4, race_low_domain(), draw), k % 4);
      score = score / row_.temperature - log64(race_exponential(high, low));
    }
    keep_better({score, first + logits_.token(k)}, best);
  }

  WarpTile<T, 4>& logits_;
  const RaceRow& row_;
  uint32_t first_block_;
};

RF_DEVICE Racer best_of_tiles(const Racer* racers, int tiles) {
  Racer best{-INFINITY, 0};
  for (int t = threadIdx.x % 32; t < tiles; t += 32) keep_better(racers[t], &best);
  for (int flip = 16; flip > 0; flip /= 2)
    keep_better({shuffle_xor(best.score, flip), shuffle_xor(best.token, flip)}, &best);
  return best;
}

}  // namespace randfuse::cuda
