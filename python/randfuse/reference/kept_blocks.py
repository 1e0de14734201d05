"""Reference of `kept_blocks`: a choice of exactly k of n, all subsets alike, for each row of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import streams

WORD = 2**32  # coins and expected counts are in units of 1/WORD
COLUMNS, BLOCKS = 0, 1  # roles; role r draws words in sub-stream 2r and the coin in 2r + 1


def kept_blocks(key: Tensor, rows: int, n: int, kept: int, coin: int, role: int, row_offset: int) -> Tensor:
    """Key () or (G,) -> (G, rows, kept + (coin > 0)) int64, ascending; a last place left empty by the coin is n."""
    keys, row = key.reshape(-1, 1), torch.arange(row_offset, row_offset + rows, device=key.device)
    keys, row = torch.broadcast_tensors(keys, row)
    stream = {"op": streams.STRUCTURED, "width": 32, "rounds": streams.WORD_ROUNDS}
    words = streams.lanes(keys, row, torch.arange(n, device=key.device), sample=2 * role, **stream)
    coins = streams.lanes(
        keys, row, torch.zeros(1, dtype=torch.int64, device=key.device), sample=2 * role + 1, **stream
    )
    return smallest(words, coins, kept, coin)


def smallest(words: Tensor, coins: Tensor, kept: int, coin: int) -> Tensor:
    """The choice from its words (…, n) and coins (…, 1): the smallest words, ties to the lowest index."""
    n = words.shape[-1]
    order = words.argsort(dim=-1, stable=True)[..., : kept + (coin > 0)]
    if coin > 0:
        last = torch.where(coins < coin, order[..., -1:], n)
        order = torch.cat((order[..., :-1], last), -1)
    return order.sort(-1).values
