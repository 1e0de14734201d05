namespace randfuse::RF_ISA {

#if RF_LEVEL == RF_AVX512
constexpr int kBytes = 64, kMostLevels = 4;  // 16 operands of 32 registers
#elif RF_LEVEL == RF_AVX2
constexpr int kBytes = 32, kMostLevels = 3;
#else
constexpr int kBytes = 16, kMostLevels = 3;
#endif

template <class S>
struct Simd {
  typedef S V __attribute__((vector_size(kBytes)));
  typedef std::conditional_t<std::is_same_v<S, float>, int32_t, int64_t> Index
      __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / sizeof(S);

  static V load(const S* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(S* p, V v) { std::memcpy(p, &v, sizeof v); }
};

// The transform across the lanes of a register: lane l meets lane l ^ kDistance. Recursion instead
// of loops: every distance must be a constant for the compiler, or registers turn into memory.
template <int kDistance, class S>
inline typename Simd<S>::V across_lanes(typename Simd<S>::V v) {
  constexpr int kLanes = Simd<S>::kLanes;
  if constexpr (kDistance == kLanes) {
    return v;
  } else {
    typename Simd<S>::V sign, swapped;
#if defined(__clang__)
    for (int l = 0; l < kLanes; ++l) swapped[l] = v[l ^ kDistance];
#else
    typename Simd<S>::Index index;
    for (int l = 0; l < kLanes; ++l) index[l] = l ^ kDistance;
    swapped = __builtin_shuffle(v, index);
#endif
    for (int l = 0; l < kLanes; ++l) sign[l] = l & kDistance ? S{-1} : S{1};
    return across_lanes<2 * kDistance, S>(swapped + sign * v);
  }
}

template <int kDistance, int kCount, class V>
inline void butterflies(V* v) {
  if constexpr (kDistance < kCount) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if (i & kDistance) continue;
      const V a = v[i], b = v[i + kDistance];
      v[i] = a + b;
      v[i + kDistance] = a - b;
    }
    butterflies<2 * kDistance, kCount>(v);
  }
}

// kLevels levels of the transform of a (rows, width) tile, from distance h on; `scale` on the way
// out.
template <int kLevels, class S>
inline void levels(S* tile, int64_t rows, int64_t width, int64_t h, S scale) {
  using V = typename Simd<S>::V;
  constexpr int kCount = 1 << kLevels;
  const int64_t step = h * width;
  const V factor = scale - V{};
  for (int64_t group = 0; group < rows; group += h * kCount) {
    S* const first = tile + group * width;
    for (int64_t at = 0; at < step; at += Simd<S>::kLanes) {
      V v[kCount];
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) v[i] = Simd<S>::load(first + at + i * step);
      butterflies<1, kCount>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) Simd<S>::store(first + at + i * step, v[i] * factor);
    }
  }
}

// All rows of a tile against each other; width is a multiple of the lanes.
template <class S>
inline void across_rows(S* tile, int64_t rows, int64_t width, S scale) {
  for (int64_t h = 1; h < rows;) {
    const int64_t left = rows / h;
    const int64_t most = int64_t{1} << kMostLevels, radix = left < most ? left : most;
    const S last = left == radix ? scale : S{1};
    if (radix == 16) levels<4>(tile, rows, width, h, last);
    if (radix == 8) levels<3>(tile, rows, width, h, last);
    if (radix == 4) levels<2>(tile, rows, width, h, last);
    if (radix == 2) levels<1>(tile, rows, width, h, last);
    h *= radix;
  }
}

// One transform of contiguous elements: n / lanes registers.
template <class T>
inline void contiguous(const T* x, T* y, int64_t n, SumOf<T> scale, SumOf<T>* buffer) {
  using S = SumOf<T>;
  constexpr int kLanes = Simd<S>::kLanes;
  S* tile = buffer;
  if constexpr (std::is_same_v<T, S>) tile = y;
  const bool one = n == kLanes;  // no rows to take the scale
  for (int64_t i = 0; i < n; i += kLanes) {
    S lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = to_float(x[i + l]);
    const auto v = across_lanes<1, S>(Simd<S>::load(lanes));
    Simd<S>::store(tile + i, one ? v * scale : v);
  }
  across_rows<S>(tile, n / kLanes, kLanes, scale);
  if constexpr (!std::is_same_v<T, S>) {
    for (int64_t i = 0; i < n; ++i) y[i] = from_float<T>(tile[i]);
  }
}

// Transforms of `cols` neighbouring columns, element r of column c at r * row_stride +
// c * col_stride.
template <class T>
inline void strided(const T* x, T* y, int64_t n, int64_t cols, int64_t row_stride,
                    int64_t col_stride, SumOf<T> scale, SumOf<T>* tile) {
  using S = SumOf<T>;
  constexpr int kLanes = Simd<S>::kLanes;
  const int64_t width = (cols + kLanes - 1) / kLanes * kLanes;
  for (int64_t r = 0; r < n; ++r) {
    const T* in = x + r * row_stride;
    S* row = tile + r * width;
    if (col_stride == 1) {
      for (int64_t c = 0; c < cols; ++c) row[c] = to_float(in[c]);
    } else {
      for (int64_t c = 0; c < cols; ++c) row[c] = to_float(in[c * col_stride]);
    }
    for (int64_t c = cols; c < width; ++c) row[c] = 0;
  }
  if (n > 1) across_rows<S>(tile, n, width, scale);
  const S last = n > 1 ? S{1} : scale;
  for (int64_t r = 0; r < n; ++r) {
    T* out = y + r * row_stride;
    const S* row = tile + r * width;
    for (int64_t c = 0; c < cols; ++c) {
      if constexpr (std::is_same_v<T, S>) {
        out[c * col_stride] = last * row[c];
      } else {
        out[c * col_stride] = from_float<T>(last * row[c]);
      }
    }
  }
}

template <class T>
void hadamard_transform(const cpu::HadamardArgs<T>& a, SumOf<T>* buffer, int64_t begin,
                        int64_t end) {
  if (a.inner == 1 && a.n >= Simd<SumOf<T>>::kLanes) {
    for (int64_t o = begin; o < end; ++o)
      contiguous<T>(a.x + o * a.n, a.y + o * a.n, a.n, a.scale, buffer);
    return;
  }
  if (a.inner == 1) {  // short transforms: neighbours in `outer` are the columns
    for (int64_t o = begin; o < end; o += 64) {
      const int64_t cols = end - o < 64 ? end - o : 64;
      strided<T>(a.x + o * a.n, a.y + o * a.n, a.n, cols, 1, a.n, a.scale, buffer);
    }
    return;
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t col = unit % a.strips() * a.width();
    const int64_t cols = a.inner - col < a.width() ? a.inner - col : a.width();
    const int64_t at = unit / a.strips() * a.n * a.inner + col;
    strided<T>(a.x + at, a.y + at, a.n, cols, a.inner, 1, a.scale, buffer);
  }
}

}  // namespace randfuse::RF_ISA
