#include "hadamard_transform.cuh"

namespace randfuse::cuda {
namespace {

int log2_of(int64_t power) {
  int bits = 0;
  while (power >> bits > 1) ++bits;
  return bits;
}

template <int kTile, class In, class Out>
cudaError_t launch_tiles(HadamardTiles<In, Out> p, cudaStream_t stream) {
  p.strips = ceil_div(p.args.inner, int64_t{1} << p.col_bits);
  return launch(hadamard_kernel<kTile, In, Out>, p.args.outer * p.strips, 1 << (kTile - 5),
                padded(1 << kTile) * sizeof(float), stream, p);
}

}  // namespace

template <class In, class Out>
cudaError_t launch_hadamard_pass(const HadamardArgs<In, Out>& a, cudaStream_t stream) {
  const bool contiguous = a.inner == 1;
  const int levels = log2_of(a.n), longest = contiguous ? 15 : 12;
  if (a.n != int64_t{1} << levels || levels > longest) return cudaErrorInvalidValue;
  if (!contiguous && !hadamard_strided(a.n, a.inner)) return cudaErrorInvalidValue;
  if (a.outer == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t status = multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;

  // Contiguous transforms follow one another: one row of memory.
  HadamardTiles<In, Out> p{a, 0, 0, levels, 0, false};
  if (contiguous) p.args.outer = 1, p.args.n = 1, p.args.inner = a.outer * a.n;
  p.is_aligned =
      aligned(a.x, p.args.inner, p.args.inner) && aligned(a.y, p.args.inner, p.args.inner);

  // Small tiles where large ones would leave multiprocessors idle. A strided tile keeps whole
  // sectors of 32 bytes, 8 columns of fp32 or 16 of 16 bits, while it fits.
  const int64_t total = a.outer * a.n * a.inner;
  int least = levels;
  if (!contiguous) least += sizeof(In) + sizeof(Out) < 8 && levels < 12 ? 4 : 3;
  const bool few = total >> kHadamardTile < 2 * multiprocessors;
  const int tile = least <= 10 && few ? 10 : least <= kHadamardTile ? kHadamardTile : 15;
  p.col_bits = contiguous ? tile : tile - levels;
  p.first = contiguous ? 0 : p.col_bits;
  if (tile == 10) return launch_tiles<10>(p, stream);
  return tile == 15 ? launch_tiles<15>(p, stream) : launch_tiles<kHadamardTile>(p, stream);
}

#define RF_INSTANTIATE(In, Out) \
  template cudaError_t launch_hadamard_pass(const HadamardArgs<In, Out>&, cudaStream_t);
RF_INSTANTIATE(float, float)
RF_INSTANTIATE(half_t, half_t)
RF_INSTANTIATE(half_t, float)
RF_INSTANTIATE(float, half_t)
RF_INSTANTIATE(bfloat16_t, bfloat16_t)
RF_INSTANTIATE(bfloat16_t, float)
RF_INSTANTIATE(float, bfloat16_t)
#undef RF_INSTANTIATE

}  // namespace randfuse::cuda
