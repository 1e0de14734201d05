// sparse_sketch, its adjoint and its entries on the SIMT executor: every bit, against the
// definition.
#include "../kernels/cuda/sparse_sketch.h"

#include "cuda_cases.h"

namespace randfuse::test {
namespace {

struct SketchCase {
  int64_t keys, d, nnz, row_begin, row_end, col_offset;
};

std::ostream& operator<<(std::ostream& out, const SketchCase& c) {
  return out << "K=" << c.keys << " d=" << c.d << " nnz=" << c.nnz << " rows=[" << c.row_begin
             << "," << c.row_end << ") offset=" << c.col_offset;
}

class Operator {
 public:
  explicit Operator(const SketchCase& c) : c_(c) {
    for (int64_t k = 0; k < c.keys; ++k) keys_.push_back(0x0123456789ABCDEF - k * 0x300000001);
    op = {keys_.data(), c.keys, c.d, c.nnz, c.row_begin, c.row_end, c.col_offset};
  }
  // (row of operator k, sign) of nonzero t of column c of the block, from the definition.
  std::pair<int64_t, float> nonzero(int64_t k, int64_t t, int64_t c) const {
    const uint64_t column = static_cast<uint64_t>(c_.col_offset + c);
    const Words words =
        block<kWordRounds>(static_cast<uint64_t>(keys_[k]), static_cast<uint32_t>(column / 4 >> 32),
                           static_cast<uint32_t>(column / 4), static_cast<uint32_t>(t),
                           domain_word(static_cast<uint32_t>(Op::kSketchIndex), 5));
    const uint32_t word = words.r[column % 4];
    const int64_t first = t * c_.d / c_.nnz, size = (t + 1) * c_.d / c_.nnz - first;
    return {first + (static_cast<int64_t>(word >> 1) * size >> 31), word % 2 ? -1.0f : 1.0f};
  }
  // body(place among the rows of all Y_k, sign) for the nonzeros of column c inside of the block.
  template <class Body>
  void column(int64_t c, const Body& body) const {
    for (int64_t e = 0; e < c_.keys * c_.nnz; ++e) {
      const auto [row, sign] = nonzero(e / c_.nnz, e % c_.nnz, c);
      if (row < c_.row_begin || row >= c_.row_end) continue;
      body(e / c_.nnz * op.rows() + row - c_.row_begin, sign);
    }
  }
  float scale() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(c_.nnz))); }

  SparseOperator op;

 private:
  SketchCase c_;
  std::vector<int64_t> keys_;
};

void compare(const std::vector<float>& got, const std::vector<float>& expected,
             const std::string& what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(std::memcmp(&got[i], &expected[i], 4) == 0,
          what << " at " << i << ": got " << got[i] << ", expected " << expected[i]);
  }
}

// Sums in the order of A's rows within a chunk, then over chunks.
template <class T>
void test_sketch(const char* dtype, int64_t m, int64_t n, int64_t pad, bool transposed,
                 const SketchCase& c) {
  std::ostringstream what;
  what << "sketch " << dtype << " (" << m << "," << n << ") pad=" << pad
       << (transposed ? " transposed " : " ") << c;
  const Operator s(c);
  const Matrix<T> a = transposed ? Matrix<T>(n, m, m + pad, 1) : Matrix<T>(m, n, n + pad, 1);
  const auto at = [&](int64_t r, int64_t j) { return transposed ? a.at(j, r) : a.at(r, j); };
  const int64_t out_rows = c.keys * s.op.rows();
  const cuda::SketchCut cut(m, n, s.op);
  const auto y = check::reproducible(what.str(), [&] {
    std::vector<float> out(out_rows * n, poison<float>()), sums(cut.chunks * out_rows * n);
    const cuda::SparseSketchArgs<T> args{a.data.data(),
                                         m,
                                         n,
                                         transposed ? 1 : a.stride,
                                         transposed ? a.stride : 1,
                                         s.op,
                                         out.data(),
                                         sums.data(),
                                         s.scale()};
    CHECK(cuda::launch_sparse_sketch(args, nullptr) == cudaSuccess, what.str());
    return out;
  });
  std::vector<float> expected(out_rows * n, 0.0f), sums(out_rows * n);
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    const int64_t rows = cut.chunk_batches * cuda::kSketchRows, shift = c.col_offset % 4;
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t r = std::max<int64_t>(chunk * rows - shift, 0);
         r < std::min((chunk + 1) * rows - shift, m); ++r) {
      s.column(r, [&](int64_t place, float sign) {
        for (int64_t j = 0; j < n; ++j) sums[place * n + j] += sign * at(r, j);
      });
    }
    for (size_t i = 0; i < sums.size(); ++i) expected[i] += sums[i];
  }
  for (float& v : expected) v *= s.scale();
  for (size_t i = 0; i < expected.size(); ++i) {  // 0 of either sign
    CHECK(y[i] == expected[i],
          what.str() << " at " << i << ": got " << y[i] << ", expected " << expected[i]);
  }
}

void test_adjoint(int64_t m, int64_t n, const SketchCase& c) {
  std::ostringstream what;
  what << "adjoint (" << m << "," << n << ") " << c;
  const Operator s(c);
  const Matrix<float> y(c.keys * s.op.rows(), n, n, 2);
  const auto x = check::reproducible(what.str(), [&] {
    std::vector<float> out(m * n, poison<float>());
    const cuda::SparseAdjointArgs args{y.data.data(), out.data(), m, n, s.op, s.scale()};
    CHECK(cuda::launch_sparse_sketch_adjoint(args, nullptr) == cudaSuccess, what.str());
    return out;
  });
  std::vector<float> expected(m * n, 0.0f);
  for (int64_t r = 0; r < m; ++r) {
    s.column(r, [&](int64_t place, float sign) {
      for (int64_t j = 0; j < n; ++j) expected[r * n + j] += sign * y.at(place, j);
    });
  }
  for (float& v : expected) v *= s.scale();
  compare(x, expected, what.str());
}

void test_entries(int64_t m, const SketchCase& c) {
  std::ostringstream what;
  what << "entries of " << m << " columns, " << c;
  const Operator s(c);
  std::vector<int64_t> rows(c.keys * c.nnz * m, -1);
  std::vector<int8_t> signs(rows.size(), 0);
  const cuda::SparseEntriesArgs args{rows.data(), signs.data(), m, s.op};
  CHECK(cuda::launch_sparse_sketch_entries(args, nullptr) == cudaSuccess, what.str());
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t e = i / m;
    const auto [row, sign] = s.nonzero(e / c.nnz, e % c.nnz, i % m);
    CHECK(rows[i] == row && signs[i] == sign, what.str() << " at " << i << ": got " << rows[i]
                                                         << " * " << int{signs[i]} << ", expected "
                                                         << row << " * " << sign);
  }
}

}  // namespace
}  // namespace randfuse::test

int main() {
  using namespace randfuse::test;
  const std::vector<SketchCase> cases = {
      {1, 37, 1, 0, 37, 0},                             // CountSketch
      {1, 100, 4, 0, 100, 6},                           // SJLT, columns from inside a block
      {3, 61, 3, 5, 50, 1},                             // three operators, some of their rows
      {2, 700, 7, 0, 700, (int64_t{1} << 34) - 2},      // two tiles, columns across 2^34
      {1, 1500, 2, 700, 1400, (int64_t{1} << 61) + 3},  // rows of both halves
      {1, 1, 1, 0, 1, 0},                               // all in one row
  };
  for (const SketchCase& c : cases) {
    test_sketch<float>("float", 700, 40, 0, false, c);  // pieces of 16 bytes
    test_sketch<float>("float", 515, 3, 2, false, c);   // elements
    test_sketch<float>("float", 600, 5, 7, true, c);    // down the columns
    test_adjoint(300, 5, c);
    test_entries(301, c);
  }
  test_sketch<randfuse::half_t>("half", 1100, 72, 8, false, cases[1]);
  test_sketch<randfuse::bfloat16_t>("bfloat16", 530, 32, 0, false, cases[2]);
  test_sketch<randfuse::bfloat16_t>("bfloat16", 530, 33, 1, false, cases[1]);
  test_sketch<float>("float", 6000, 4, 0, false, cases[1]);  // chunks
  test_sketch<float>("float", 0, 8, 0, false, cases[0]);
  test_sketch<float>("float", 9, 0, 0, false, cases[0]);
  test_adjoint(140, 1100, cases[1]);  // two strips
  test_adjoint(0, 3, cases[0]);
  return check::report("test_cuda_sparse_sketch");
}
