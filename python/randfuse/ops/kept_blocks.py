"""`kept_blocks`: which of n blocks a row of blocks keeps, and the law of their number. Serves structured dropout.

No CUDA kernel by design and no case: its cost stands in the cases of the products it serves.

>>> choice(0.1, 6)  # 5.4 of 6 on average: 5, and a sixth in 0.4 of all cases
(5, 1717986918, 1.111111111130274)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._backends import call
from .._registry import rules
from ..reference.kept_blocks import WORD


def choice(p: float, n: int) -> tuple[int, int, float]:
    """(kept, coin, scale) of a dropout of n blocks: `kept` of them stay, and one more with probability coin/2**32.

    The number kept is as steady as it can be and right on average, E = (1 − p)·n to within 2**-33 blocks, so that
    p = 0.1 of 6 blocks is 0.1 and not 1/6. The scale is n/E of the law as it is drawn: the mean is exactly kept.
    """
    units = round((1 - p) * n * WORD)
    return *divmod(units, WORD), n * WORD / units if units else 0.0


def draw(key: Tensor, rows: int, n: int, kept: int, coin: int, role: int, row_offset: int = 0) -> Tensor:
    """Indices (G, rows, kept + (coin > 0)) int64, ascending, of the blocks that stay; n where the coin left none."""
    return call("kept_blocks", key, rows, n, kept, coin, role, row_offset)


def _fake(key: Tensor, rows: int, n: int, kept: int, coin: int, *_: int) -> Tensor:
    return key.new_empty((key.numel(), rows, kept + (coin > 0)))


def _vmap(info: Any, in_dims: tuple[Any, ...], key: Tensor, *rest: int) -> Any:
    keys = key.movedim(in_dims[0], 0)
    own = call("kept_blocks", keys.reshape(-1), *rest)
    return own.reshape(info.batch_size, keys[:1].numel() if keys.dim() > 1 else 1, *own.shape[1:]), 0


rules("kept_blocks", _fake, vmap=_vmap)
