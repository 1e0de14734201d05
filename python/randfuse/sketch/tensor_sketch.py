"""TensorSketch: the polynomial kernel's features, without forming tensor powers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import keys
from .sparse import CountSketch


class TensorSketch:
    """Sketch of x ⊗ … ⊗ x (`degree` factors) for x (…, m) -> (…, d): ⟨TS(x), TS(y)⟩ has the mean ⟨x, y⟩^degree.

    It is the CountSketch of the tensor power with row Σhⱼ(iⱼ) mod d and sign Πsⱼ(iⱼ), computed as the cyclic
    convolution of `degree` CountSketches of x: ``irfft(prod(rfft(Cⱼ x)))``. Differentiable.

    Args:
        d, m: features out and in.
        degree: of the polynomial, at least 1.
        key, generator: as in `SJLT`.

    Pham, Pagh, "Fast and scalable polynomial kernels via explicit feature maps", KDD 2013.

    >>> x = torch.randn(5, 30)
    >>> TensorSketch(64, 30, degree=2, key=randfuse.key(0))(x).shape
    torch.Size([5, 64])
    """

    def __init__(
        self, d: int, m: int, *, degree: int = 2, key: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise ValueError(f"TensorSketch: degree must be a positive int, got {degree}")
        device = key.device if isinstance(key, Tensor) else torch.device("cpu")
        keys.check("TensorSketch", key, generator, 1, device)
        self.key = keys.resolve(key, generator, device).reshape(())
        self.d, self.m, self.degree = d, m, degree
        self.factors = [CountSketch(d, m, key=keys.fold_in(self.key, j)) for j in range(degree)]

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # which the library's transform refuses
            return self.factors[0].apply(x, -1)
        spectrum = torch.fft.rfft(self.factors[0].apply(x, -1))
        for factor in self.factors[1:]:
            spectrum = spectrum * torch.fft.rfft(factor.apply(x, -1))
        return torch.fft.irfft(spectrum, n=self.d)

    def __repr__(self) -> str:
        return f"TensorSketch(d={self.d}, m={self.m}, degree={self.degree})"
