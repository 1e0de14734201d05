"""`kept_blocks`: the words of the choice are drawn here, torch sorts them; static shapes, no synchronisation.

Sizes are small (a word for each 128 columns, or for each column once), so launches are all that it costs.
"""

import torch
import triton
import triton.language as tl
from randfuse.reference import streams
from randfuse.reference.kept_blocks import smallest

from . import launch, philox

DOMAIN = tl.constexpr(streams.domain_word(streams.STRUCTURED, 32))
_BLOCK = 1024


@triton.jit
def words32(key, i, j, s):
    """The four words (len(j), 4) of the blocks j of one row, as int64."""
    r0, r1, r2, r3 = tl.philox(key, j.to(tl.uint32), i, s, DOMAIN, philox.WORD_ROUNDS)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # word bit 1, word bit 0 are appended axis by axis
    return tl.reshape(words, [4 * j.shape[0]]).to(tl.uint32).to(tl.int64)


@triton.jit(do_not_specialize=("row_offset", "role"))
def kept_blocks_kernel(key_ptr, word_ptr, rows, n: tl.int64, row_offset, role, BLOCK: tl.constexpr):
    """(G·rows, 1 + n): the coin of each row, then its words."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (BLOCK // 4)
    key = tl.load(key_ptr + row // rows)
    i = (row % rows + row_offset).to(tl.uint32)
    choice = (2 * role).to(tl.uint32)
    words = words32(key, i, first + tl.arange(0, BLOCK // 4), choice)
    out = word_ptr + row * (n + 1)
    place = first.to(tl.int64) * 4 + tl.arange(0, BLOCK)
    tl.store(out + 1 + place, words, mask=place < n)
    coin, _, _, _ = tl.philox(key, choice ^ choice, i, choice + 1, DOMAIN, philox.WORD_ROUNDS)
    tl.store(out, coin.to(tl.uint32).to(tl.int64), mask=first == 0)


@launch.op("kept_blocks(Tensor key, SymInt rows, int n, int kept, int coin, int role, SymInt row_offset) -> Tensor")
def kept_blocks(key, rows, n, kept, coin, role, row_offset):
    for name, value, limit in (
        ("rows", rows, 2**32),
        ("n", n, 2**32 - 1),
        ("kept", kept, n),
        ("coin", coin, 2**32 - 1),
    ):
        if not 0 <= value <= limit:
            raise ValueError(f"kept_blocks: {name} must be in [0, {limit}], got {value}")
    if coin and kept == n:
        raise ValueError(f"kept_blocks: coin must be 0 where all are kept, got {coin}")
    if not 0 <= role < 2**31:
        raise ValueError(f"kept_blocks: role must be in [0, 2**31), got {role}")
    if not 0 <= row_offset <= 2**32 - rows:
        raise ValueError(f"kept_blocks: row_offset must be in [0, 2**32 - rows], got {row_offset}")
    if key.dtype != torch.int64:
        raise TypeError(f"kept_blocks: key must be int64, got {key.dtype}")
    if key.dim() > 1:
        raise ValueError(f"kept_blocks: key must have shape () or (G,), got {tuple(key.shape)}")
    groups = key.numel()
    words = key.new_empty((groups, rows, 1 + n))
    if words.numel() != 0:
        tiles = (groups * rows, triton.cdiv(max(n, 1), _BLOCK))
        kept_blocks_kernel[tiles](key.contiguous(), words, rows, n, row_offset, role, BLOCK=_BLOCK)
    return smallest(words[..., 1:], words[..., :1], kept, coin)
