// multi_sample_scale on the SIMT executor: every bit, against the definition.
#include "../kernels/cuda/multi_sample_scale.h"

#include "cuda_cases.h"

namespace randfuse::test {
namespace {

constexpr uint32_t kDomain = domain_word(static_cast<uint32_t>(Op::kMultiSampleCount), 5);

template <class T>
void run(const char* dtype, int samples, int64_t rows, int64_t cols, int64_t pad,
         const StreamCase& c) {
  std::ostringstream what;
  what << dtype << " samples=" << samples << " (" << rows << "," << cols << ") pad=" << pad << " "
       << c;
  Stream stream(c, rows, Op::kMultiSampleCount);
  stream.mask.domain = kDomain;
  const Matrix<T> x(rows, cols, cols + pad, 1);
  const auto out = check::reproducible(what.str(), [&] {
    std::vector<T> y(rows * cols, poison<T>());
    const cuda::MultiSampleScaleArgs<T> args{x.data.data(), y.data(),    rows,    cols,
                                             x.stride,      stream.mask, samples, stream.rate};
    CHECK(cuda::launch_multi_sample_scale(args, nullptr) == cudaSuccess, what.str());
    return y;
  });
  uint64_t table[kMaxCount + 1];
  const float scale = static_cast<float>(count_table(drop_rate(c.p).threshold, samples, table));
  for (int64_t i = 0; i < rows * cols; ++i) {
    const int64_t row = i / cols, col = c.col_offset + i % cols,
                  run = row / stream.mask.rows_per_key;
    const uint32_t at = static_cast<uint32_t>(c.row_offset + row % stream.mask.rows_per_key);
    const Words words = block<kWordRounds>(static_cast<uint64_t>(stream.mask.keys[run]), at,
                                           static_cast<uint32_t>(col / 4), 0, kDomain);
    int count = 0;
    for (int k = 0; k < samples; ++k) count += lane(words, col, 5) >= table[k];
    const float factor = static_cast<float>(count) * scale;
    const T expected = from_float<T>(count > 0 ? x.at(row, i % cols) * factor : 0.0f);
    CHECK(std::memcmp(&out[i], &expected, sizeof(T)) == 0,
          what.str() << " at (" << row << "," << i % cols << "): got " << to_float(out[i])
                     << ", expected " << to_float(expected));
  }
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  for_each_dtype([](auto type, const char* name) {
    using T = decltype(type);
    for (StreamCase c : kStreamCases) {
      c.col_offset = std::min<int64_t>(c.col_offset, int64_t{1} << 33);
      run<T>(name, 8, 6, 24, 0, c);
    }
    run<T>(name, 128, 4, 37, 3, kStreamCases[0]);
    run<T>(name, 1, 10, 40, 8, kStreamCases[3]);
  });
  return check::report("test_cuda_multi_sample_scale");
}
