// What the bindings of ops that sample from rows of logits share.
#pragma once
#include "../kernels/cpu/categorical_sample.h"
#include "checks.h"

#ifdef RANDFUSE_CUDA
#include "../kernels/cuda/logits.h"
#endif

namespace randfuse {

// Leading dimensions as they lie; only what RowLayout cannot say is copied.
inline Tensor with_row_layout(const Tensor& x) {
  const bool fits = x.dim() >= 1 && x.dim() - 1 <= cpu::RowLayout::kMaxDims &&
                    (x.size(-1) <= 1 || x.stride(-1) == 1);
  return fits ? x : x.contiguous();
}

inline cpu::RowLayout row_layout(const Tensor& x) {
  cpu::RowLayout layout{};
  layout.dims = static_cast<int>(x.dim() - 1);
  for (int d = 0; d < layout.dims; ++d) {
    layout.size[d] = x.size(d);
    layout.stride[d] = x.stride(d);
  }
  return layout;
}

// A parameter of shape () or (rows,) whose values can be read and are in range.
template <class V>
class RowParameter {
 public:
  template <class Valid>
  RowParameter(const char* op, const char* name, const OptionalTensor& given, int64_t rows,
               const char* range, const Valid& valid) {
    if (!given.has_value()) return;
    TORCH_CHECK_VALUE(
        given->is_cpu() && (given->dim() == 0 || (given->dim() == 1 && given->size(0) == rows)), op,
        ": ", name, " must have shape () or (rows,) = (", rows, ") on cpu, got ", given->sizes(),
        " on ", given->device());
    values_ = given->to(c10::CppTypeToScalarType<V>::value).contiguous();
    const V* v = values_.const_data_ptr<V>();
    for (int64_t i = 0; i < values_.numel(); ++i)
      TORCH_CHECK_VALUE(valid(v[i]), op, ": ", name, " must be ", range, ", got ", v[i]);
    source_ = {v, given->dim() == 0};
  }
  operator cpu::PerRow<V>() const { return source_; }

 private:
  Tensor values_;
  cpu::PerRow<V> source_{nullptr, true};
};

// Temperature and filters, one value or one a row.
struct SamplingParameters {
  RowParameter<double> temperature;
  RowParameter<int64_t> top_k;
  RowParameter<double> top_p, min_p;

  SamplingParameters(const char* op, int64_t rows, const Tensor& t, const OptionalTensor& k,
                     const OptionalTensor& p, const OptionalTensor& m)
      : temperature(op, "temperature", t, rows, "0 or in [2**-100, 2**100]", warm),
        top_k(op, "top_k", k, rows, "at least 1", [](int64_t v) { return v >= 1; }),
        top_p(op, "top_p", p, rows, "in [0, 1]", fraction),
        min_p(op, "min_p", m, rows, "in [0, 1]", fraction) {}

  static bool warm(double t) { return t == 0.0 || (t >= 0x1p-100 && t <= 0x1p100); }
  static bool fraction(double p) { return p >= 0.0 && p <= 1.0; }
};

#ifdef RANDFUSE_CUDA

// The same for a kernel on `device`. What lies on the CPU is checked like a CPU op's; the kernel
// clamps what lies on the device.
template <class V>
class CudaRowParameter {
 public:
  template <class Valid>
  CudaRowParameter(const char* op, const char* name, const OptionalTensor& given, int64_t rows,
                   at::Device device, V otherwise, const char* range, const Valid& valid)
      : source_{nullptr, true, otherwise} {
    if (!given.has_value()) return;
    if (given->is_cpu()) {
      const RowParameter<V> host(op, name, given, rows, range, valid);
      const cpu::PerRow<V> values = host;
      if (values.shared) {
        source_.otherwise = values.at(0, otherwise);
        return;
      }
    }
    TORCH_CHECK_VALUE((given->is_cpu() || given->device() == device) &&
                          (given->dim() == 0 || (given->dim() == 1 && given->size(0) == rows)),
                      op, ": ", name, " must have shape () or (rows,) = (", rows, ") on ", device,
                      " or cpu, got ", given->sizes(), " on ", given->device());
    values_ =
        given->to(at::TensorOptions(device).dtype(c10::CppTypeToScalarType<V>::value)).contiguous();
    source_ = {values_.const_data_ptr<V>(), given->dim() == 0, otherwise};
  }
  operator const cuda::PerRow<V>&() const { return source_; }

 private:
  Tensor values_;  // the allocator hands memory out in stream order, so it need not outlive the op
  cuda::PerRow<V> source_;
};

struct CudaSamplingParameters {
  CudaRowParameter<double> temperature;
  CudaRowParameter<int64_t> top_k;
  CudaRowParameter<double> top_p, min_p;

  CudaSamplingParameters(const char* op, int64_t rows, at::Device device, const Tensor& t,
                         const OptionalTensor& k, const OptionalTensor& p, const OptionalTensor& m)
      : temperature(op, "temperature", t, rows, device, 1.0, "0 or in [2**-100, 2**100]",
                    SamplingParameters::warm),
        top_k(op, "top_k", k, rows, device, int64_t{1} << 62, "at least 1",
              [](int64_t v) { return v >= 1; }),
        top_p(op, "top_p", p, rows, device, 1.0, "in [0, 1]", SamplingParameters::fraction),
        min_p(op, "min_p", m, rows, device, 0.0, "in [0, 1]", SamplingParameters::fraction) {}
};

#endif  // RANDFUSE_CUDA

}  // namespace randfuse
