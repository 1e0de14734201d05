"""`LockedDropout`: one mask a sequence, shared over time."""

from __future__ import annotations

from torch import Tensor

from ..keys import draw_key
from ..ops.dropout import dropout
from ._tensor_p import HasP


class LockedDropout(HasP):
    """Variational dropout: each sequence has one mask over its features, the same at all time steps.

    Equivalent to: ``x * F.dropout(torch.ones(1, B, H), p)`` for x (T, B, H)

    One pass over x, and no mask is stored. Each training forward draws a fresh key, or takes the one it is given. The
    time is the first dimension, with `batch_first` the second, which costs a transposed copy. `p` may be a 0-d tensor
    (see `DropoutSchedule`).

    Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", NIPS 2016.

    >>> layer = randfuse.nn.LockedDropout(0.5)
    >>> y = layer(torch.ones(5, 2, 3))
    >>> torch.equal(y[0], y[4])
    True
    """

    def __init__(self, p: float | Tensor = 0.5, batch_first: bool = False) -> None:
        super().__init__()
        self._set_p(p)
        self.batch_first = batch_first

    def forward(self, input: Tensor, key: Tensor | None = None) -> Tensor:
        least = 3 if self.batch_first else 2
        if input.dim() < least:
            raise ValueError(f"LockedDropout: input must have at least {least} dimensions, got {tuple(input.shape)}")
        if not self._draws:
            return input
        x = input.transpose(0, 1) if self.batch_first else input
        key = draw_key(x.device) if key is None else key
        if not isinstance(key, Tensor) or key.dim() != 0:
            raise ValueError(f"LockedDropout: key must be an int64 Tensor of shape (), got {key}")
        # The rows of one time step are a run that has a key: give all runs the same one, and they get the same masks.
        y = dropout(x, self.p, key=key.expand(max(x.shape[0], 1)))
        return y.transpose(0, 1) if self.batch_first else y
