// One vocabulary for float and double: VectorOf<S>, kLanes<S>, load, store, broadcast, fma.
// Included after simd.h, and like it.

#if RF_LEVEL == RF_AVX512
using F64 = __m512d;
inline F64 load(const double* p) { return _mm512_loadu_pd(p); }
inline void store(double* p, F64 x) { _mm512_storeu_pd(p, x); }
inline F64 broadcast(double x) { return _mm512_set1_pd(x); }
inline F64 fma(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
#elif RF_LEVEL == RF_AVX2
using F64 = __m256d;
inline F64 load(const double* p) { return _mm256_loadu_pd(p); }
inline void store(double* p, F64 x) { _mm256_storeu_pd(p, x); }
inline F64 broadcast(double x) { return _mm256_set1_pd(x); }
inline F64 fma(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
#else
typedef double F64 __attribute__((vector_size(16)));
inline F64 load(const double* p) {
  F64 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(double* p, F64 x) { std::memcpy(p, &x, sizeof x); }
inline F64 broadcast(double x) { return F64{x, x}; }
inline F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
#endif

template <class S>
struct VectorOf {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};
template <class S>
constexpr int kLanes = sizeof(typename VectorOf<S>::type) / sizeof(S);

// n elements of any stride as contiguous float or double.
template <class T>
inline void widen(const T* in, int64_t stride, SumOf<T>* out, int64_t n) {
  int64_t l = 0;
  if (stride == 1) {
    for (; l + kLanes<SumOf<T>> <= n; l += kLanes<SumOf<T>>) store(out + l, load(in + l));
  }
  for (; l < n; ++l) out[l] = to_float(in[l * stride]);
}
