#include "linear_dropout.cuh"

namespace randfuse::cuda {
namespace {

template <class T>
MapParams<T> params(const ActDropoutArgs<T>& a) {
  return {a.z,    a.other, a.out,    a.z_stride, a.other_stride,
          a.rows, a.cols,  a.stream, a.rate};
}

template <class T, Activation kAct>
cudaError_t forward(const ActDropoutArgs<T>& a, cudaStream_t stream) {
  return launch_map(act_dropout_kernel<T, kAct, true>, act_dropout_kernel<T, kAct, false>,
                    params(a), stream);
}

template <class T, Activation kAct>
cudaError_t backward(const ActDropoutArgs<T>& a, cudaStream_t stream) {
  return launch_map(act_dropout_grad_kernel<T, kAct, true>, act_dropout_grad_kernel<T, kAct, false>,
                    params(a), stream);
}

}  // namespace

template <class T>
cudaError_t launch_act_dropout(const ActDropoutArgs<T>& a, cudaStream_t stream) {
  switch (a.activation) {
    case Activation::kNone:
      return forward<T, Activation::kNone>(a, stream);
    case Activation::kRelu:
      return forward<T, Activation::kRelu>(a, stream);
    case Activation::kGelu:
      return forward<T, Activation::kGelu>(a, stream);
    case Activation::kSilu:
      return forward<T, Activation::kSilu>(a, stream);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_act_dropout_grad(const ActDropoutArgs<T>& a, cudaStream_t stream) {
  switch (a.activation) {
    case Activation::kNone:
      return backward<T, Activation::kNone>(a, stream);
    case Activation::kRelu:
      return backward<T, Activation::kRelu>(a, stream);
    case Activation::kGelu:
      return backward<T, Activation::kGelu>(a, stream);
    case Activation::kSilu:
      return backward<T, Activation::kSilu>(a, stream);
  }
  return cudaErrorInvalidValue;
}

template cudaError_t launch_act_dropout(const ActDropoutArgs<float>&, cudaStream_t);
template cudaError_t launch_act_dropout(const ActDropoutArgs<half_t>&, cudaStream_t);
template cudaError_t launch_act_dropout(const ActDropoutArgs<bfloat16_t>&, cudaStream_t);
template cudaError_t launch_act_dropout_grad(const ActDropoutArgs<float>&, cudaStream_t);
template cudaError_t launch_act_dropout_grad(const ActDropoutArgs<half_t>&, cudaStream_t);
template cudaError_t launch_act_dropout_grad(const ActDropoutArgs<bfloat16_t>&, cudaStream_t);

}  // namespace randfuse::cuda
