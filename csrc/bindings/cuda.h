// What the CUDA half of every binding needs: device guard, stream, probability, launch status.
// Included under RANDFUSE_CUDA only.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../kernels/cuda/rate.h"
#include "checks.h"

namespace randfuse {

// For the duration of an op: its tensors' device is the current one, this is its stream, and what
// it calls is not autocast.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& x)
      : guard_(x.device()), stream_(c10::cuda::getCurrentCUDAStream(x.device().index())) {}
  operator cudaStream_t() const { return stream_; }

 private:
  NoAutocast no_autocast_;
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

// The probability of a CUDA op. A tensor on the device is read by the kernel, never by the host.
class CudaRate {
 public:
  CudaRate(const char* op, double p, const OptionalTensor& p_tensor, at::Device device) {
    if (!p_tensor.has_value() || p_tensor->is_cpu()) {
      source_ = {cpu_rate(op, p, p_tensor), nullptr};
      return;
    }
    TORCH_CHECK_VALUE(
        p_tensor->dim() == 0 && p_tensor->is_floating_point() && p_tensor->device() == device, op,
        ": p must be a number or a 0-d floating tensor on cpu or ", device, ", got ",
        p_tensor->sizes(), " ", dtype_name(*p_tensor), " on ", p_tensor->device());
    p_ = p_tensor->to(at::kDouble);
    source_ = {{}, p_.const_data_ptr<double>()};
  }
  operator const cuda::RateSource&() const { return source_; }

 private:
  Tensor p_;  // the allocator hands memory out in stream order, so it need not outlive the op
  cuda::RateSource source_;
};

// Calls body(T{}) with the storage type of x, which check_float has seen not to be float64.
template <class Body>
void dispatch_cuda_float(const Tensor& x, Body&& body) {
  dispatch_float(x, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), double>) body(type);
  });
}

}  // namespace randfuse
