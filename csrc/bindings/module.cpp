// randfuse._C: importing it registers torch.ops.randfuse (static initialisers of the other
// bindings). Beside that it tells how it was built and lets tests reach the host's Philox. No
// tensors here.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "../kernels/common/streams.h"
#include "../kernels/cpu/isa.h"

#ifdef RANDFUSE_CUDA
#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <vector>

#include "../kernels/cuda/known_answers.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#ifdef RANDFUSE_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = RANDFUSE_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
#endif
  info["cuda_reason"] = RANDFUSE_CUDA_REASON;
  info["torch"] = RANDFUSE_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["isa"] = randfuse::isa_name(randfuse::active_isa());
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

std::string cap_isa(const std::string& name) {
  for (const auto isa : {randfuse::Isa::kBaseline, randfuse::Isa::kAvx2, randfuse::Isa::kAvx512}) {
    if (name == randfuse::isa_name(isa)) return randfuse::isa_name(randfuse::cap_isa(isa));
  }
  throw std::invalid_argument("cap_isa: name must be baseline, avx2 or avx512, got " + name);
}

std::tuple<uint32_t, uint32_t, uint32_t, uint32_t> philox(int rounds, uint32_t c0, uint32_t c1,
                                                          uint32_t c2, uint32_t c3, uint32_t k0,
                                                          uint32_t k1) {
  if (rounds != 7 && rounds != 10) {
    throw std::invalid_argument("philox4x32: rounds must be 7 or 10, got " +
                                std::to_string(rounds));
  }
  const randfuse::Words w = rounds == 7 ? randfuse::philox4x32<7>(c0, c1, c2, c3, k0, k1)
                                        : randfuse::philox4x32<10>(c0, c1, c2, c3, k0, k1);
  return {w.r[0], w.r[1], w.r[2], w.r[3]};
}

#ifdef RANDFUSE_CUDA
// The same questions to the current device. question: 0 philox, 1 block, 2 lane, 3 fold_in.
std::vector<uint32_t> cuda_known_answers(uint32_t question, uint32_t rounds,
                                         const std::vector<uint32_t>& c, uint64_t key,
                                         uint64_t data, uint32_t log2_width, int64_t count) {
  if (question > 3 || c.size() != 4 || count < 1) {
    throw std::invalid_argument("cuda_known_answers: needs question 0 to 3, 4 counters, count > 0");
  }
  const randfuse::cuda::KnownAnswerArgs args{static_cast<randfuse::cuda::Question>(question),
                                             rounds,
                                             {c[0], c[1], c[2], c[3]},
                                             key,
                                             data,
                                             log2_width};
  std::vector<uint32_t> answers(4 * count);
  const size_t bytes = answers.size() * sizeof answers[0];
  void* device = nullptr;
  cudaError_t status = cudaMalloc(&device, bytes);
  if (status == cudaSuccess) {
    status =
        randfuse::cuda::launch_known_answers(args, count, static_cast<uint32_t*>(device), nullptr);
  }
  if (status == cudaSuccess) {
    status = cudaMemcpy(answers.data(), device, bytes, cudaMemcpyDeviceToHost);
  }
  cudaFree(device);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  return answers;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of randfuse; importing registers torch.ops.randfuse";
  m.def("build_info", &build_info,
        "How the extension was built and the CPU instruction set it uses");
  m.def("cap_isa", &cap_isa, py::arg("name"),
        "Use at most this instruction set; returns the active one");
  m.def("philox4x32", &philox, "Known-answer hook: (rounds, c0, c1, c2, c3, k0, k1) -> four words");
  m.def("fold_in", &randfuse::fold_in, py::arg("key"), py::arg("data"),
        "Known-answer hook, unsigned 64 bits");
#ifdef RANDFUSE_CUDA
  m.def("cuda_known_answers", &cuda_known_answers, py::arg("question"), py::arg("rounds"),
        py::arg("c"), py::arg("key"), py::arg("data"), py::arg("log2_width"), py::arg("count"),
        "Known-answer hook of the device: 4 words per answer, see kernels/cuda/known_answers.h");
#endif
}
