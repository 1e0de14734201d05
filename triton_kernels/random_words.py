"""`random_words`: a Philox call for each element, 24 bytes read and 16 written; small, so one launch is what it costs."""

import torch
import triton
import triton.language as tl

from . import launch, philox

_BLOCK = 256


@triton.jit(do_not_specialize=("domain",))
def random_words_kernel(key_ptr, number_ptr, sample_ptr, low_ptr, high_ptr, n: tl.int64, domain, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    key = tl.load(key_ptr + at, mask=inside, other=0)
    number = tl.load(number_ptr + at, mask=inside, other=0)
    sample = tl.load(sample_ptr + at, mask=inside, other=0).to(tl.uint32)
    j, i = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    domain = domain.to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(key, j, i, sample, domain, philox.WORD_ROUNDS)
    tl.store(low_ptr + at, r1.to(tl.uint64) << 32 | r0.to(tl.uint64), mask=inside)
    tl.store(high_ptr + at, r3.to(tl.uint64) << 32 | r2.to(tl.uint64), mask=inside)


@launch.op("random_words(Tensor key, Tensor number, Tensor sample, int domain) -> (Tensor, Tensor)")
def random_words(key, number, sample, domain):
    for name, x in (("key", key), ("number", number), ("sample", sample)):
        if x.dtype != torch.int64:
            raise TypeError(f"random_words: {name} must be int64, got {x.dtype}")
        if x.shape != key.shape or x.device != key.device:
            raise ValueError(
                f"random_words: {name} must have the shape of key = {tuple(key.shape)} on {key.device}, "
                f"got {tuple(x.shape)} on {x.device}"
            )
    if not 0 <= domain < 2**32:
        raise ValueError(f"random_words: domain must be in [0, 2**32), got {domain}")
    low, high = (torch.empty(key.shape, dtype=torch.int64, device=key.device) for _ in range(2))
    if key.numel() != 0:
        grid = (triton.cdiv(key.numel(), _BLOCK),)
        random_words_kernel[grid](
            key.contiguous(), number.contiguous(), sample.contiguous(), low, high, key.numel(), domain, BLOCK=_BLOCK
        )
    return low, high
