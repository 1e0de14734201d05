"""`EmbeddingDropout`: `nn.Embedding` with dropped rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.embedding_dropout import embedding_dropout
from ._tensor_p import HasP


class EmbeddingDropout(HasP, nn.Embedding):
    """`nn.Embedding` of which whole rows are dropped in training, with the state of `nn.Embedding`.

    Equivalent to: ``F.embedding(tokens, weight * F.dropout(torch.ones(V, 1), p))``

    All occurrences of a token in one forward share its fate; the table is not touched beyond the rows looked up. Each
    forward draws a fresh key, or takes the one it is given; in eval mode it is `nn.Embedding`. `options` are those of
    `nn.Embedding`; `p` may be a 0-d tensor (see `DropoutSchedule`).

    >>> layer = randfuse.nn.EmbeddingDropout(100, 8, p=0.1)
    >>> layer(torch.tensor([[3, 14, 15]])).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, p: float | Tensor = 0.1, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        self._set_p(p)

    def forward(self, input: Tensor, key: Tensor | None = None) -> Tensor:
        return embedding_dropout(
            input,
            self.weight,
            self.p,
            self.training,
            padding_idx=self.padding_idx,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            key=key,
        )
