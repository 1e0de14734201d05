// random_words: blocks of words at coordinates of their own. The CPU only: on a GPU it is Triton's
// or the reference's.
#include "../kernels/cpu/random_words.h"

#include <torch/library.h>

#include "checks.h"

namespace randfuse {
namespace {

std::tuple<Tensor, Tensor> random_words_cpu(const Tensor& key, const Tensor& number,
                                            const Tensor& sample, int64_t domain) {
  constexpr const char* op = "random_words";
  const auto check = [&](const char* name, const Tensor& x) {
    TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, op, ": ", name, " must be int64, got ",
                     dtype_name(x));
    TORCH_CHECK_VALUE(x.sizes() == key.sizes() && x.is_cpu(), op, ": ", name,
                      " must have the shape of key = ", key.sizes(), " on cpu, got ", x.sizes(),
                      " on ", x.device());
    return x.contiguous();
  };
  const Tensor k = check("key", key), n = check("number", number), s = check("sample", sample);
  TORCH_CHECK_VALUE(0 <= domain && domain < int64_t{1} << 32, op,
                    ": domain must be in [0, 2**32), got ", domain);
  const Tensor low = at::empty(key.sizes(), key.options()),
               high = at::empty(key.sizes(), key.options());
  const cpu::RandomWordsArgs args{in<int64_t>(k),    in<int64_t>(n),
                                  in<int64_t>(s),    static_cast<uint32_t>(domain),
                                  out<int64_t>(low), out<int64_t>(high)};
  // Blocks a task: some 10 us of work.
  at::parallel_for(0, key.numel(), 4096,
                   [&](int64_t begin, int64_t end) { cpu::random_words(args, begin, end); });
  return {low, high};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def("random_words(Tensor key, Tensor number, Tensor sample, int domain) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) { m.impl("random_words", random_words_cpu); }

}  // namespace randfuse
