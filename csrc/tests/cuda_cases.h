// Inputs of the CUDA kernels' tests: awkward shapes, offsets, keys, probabilities.
#pragma once
#include <cmath>
#include <limits>
#include <ostream>
#include <random>
#include <vector>

#include "../kernels/common/dtype.h"
#include "../kernels/cuda/rate.h"
#include "check.h"

namespace randfuse::test {

struct StreamCase {
  int64_t keys;  // G
  int64_t row_offset, col_offset;
  double p;
  bool device_p;
};

inline const std::vector<StreamCase> kStreamCases = {
    {1, 0, 0, 0.3, false},
    {1, 5, 16, 0.5, true},
    {1, 0, 3, 0.9, false},
    {2, 7, 0, 0.1, true},
    {2, 1, 13, 0.3, false},
    {1, (int64_t{1} << 32) - 4096, int64_t{1} << 34, 0.25, false},
    {1, 0, 0, 0.0, false},
    {1, 0, 8, 1.0, true},
    {1, 0, 0, std::numeric_limits<double>::quiet_NaN(), true},
};

inline std::ostream& operator<<(std::ostream& out, const StreamCase& c) {
  return out << "G=" << c.keys << " offsets=(" << c.row_offset << "," << c.col_offset
             << ") p=" << c.p << (c.device_p ? " on the device" : "");
}

// Owns what the device pointers of a case point to.
class Stream {
 public:
  Stream(const StreamCase& c, int64_t rows, Op op, uint32_t sample = 0) : p_(1, c.p) {
    for (int64_t g = 0; g < c.keys; ++g) keys_.push_back(0x1234567890ABCDEF + g * 0x1000000001);
    mask = {keys_.data(), std::max<int64_t>(rows / c.keys, 1),   c.row_offset, c.col_offset,
            sample,       mask_domain(static_cast<uint32_t>(op))};
    rate = c.device_p ? cuda::RateSource{{0, -1.0}, p_.data()}
                      : cuda::RateSource{drop_rate(c.p), nullptr};
  }
  // The decision of one element, from the definition.
  bool keep(int64_t row, int64_t col) const {
    const uint64_t key = static_cast<uint64_t>(keys_[row / mask.rows_per_key]);
    const int64_t c = mask.col_offset + col;
    const Words b =
        block<kMaskRounds>(key, static_cast<uint32_t>(mask.row_offset + row % mask.rows_per_key),
                           static_cast<uint32_t>(c / 8), mask.sample, mask.domain);
    return lane16(b, static_cast<uint32_t>(c % 8)) >= drop_rate(p_[0]).threshold;
  }
  double scale() const { return drop_rate(p_[0]).scale; }

  MaskStream mask;
  cuda::RateSource rate;

 private:
  std::vector<int64_t> keys_;
  std::vector<double> p_;
};

// A (rows, cols) matrix inside a wider allocation: `stride` elements between rows.
template <class T>
struct Matrix {
  int64_t rows, cols, stride;
  std::vector<T> data;

  Matrix(int64_t rows_, int64_t cols_, int64_t stride_, unsigned seed)
      : rows(rows_), cols(cols_), stride(stride_), data(rows_ * stride_) {
    std::mt19937 bits(seed);
    std::normal_distribution<float> normal;
    for (T& v : data) v = from_float<T>(normal(bits));
  }
  float at(int64_t r, int64_t c) const { return to_float(data[r * stride + c]); }
  void set(int64_t r, int64_t c, float v) { data[r * stride + c] = from_float<T>(v); }
};

template <class T>
T poison() {
  return from_float<T>(std::numeric_limits<float>::quiet_NaN());
}

// One rounding to T beside an absolute error of fp32 arithmetic.
template <class T>
bool near(float got, double expected, double absolute) {
  const double relative = sizeof(T) == 4 ? 1e-6 : std::is_same_v<T, half_t> ? 0x1p-10 : 0x1p-7;
  return std::abs(got - expected) <= relative * std::abs(expected) + absolute;
}

template <class Body>
void for_each_dtype(const Body& body) {
  body(float{}, "float");
  body(half_t{}, "half");
  body(bfloat16_t{}, "bfloat16");
}

}  // namespace randfuse::test
