"""`nn.Linear` whose weight learns from a sample of the tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..sketch import _checks
from ..sketch.vcas import METHODS, sampled_linear


class SketchedLinear(nn.Linear):
    """`nn.Linear`; in training the gradient of the weight comes from a share `ratio` of the tokens, unbiased.

    Token t, of input x and output gradient g, is drawn with probability min(1, c‖g‖‖x‖) and divided by it, which is
    the least variance that a sample of the size has. The gradients of input and bias are exact. state_dict is that
    of `nn.Linear`. `sketch.VarianceController` chooses the ratio.

    Args:
        ratio: kept share ν in (0, 1].
        method: "pivotal" (exactly int(T ν) tokens, rivals in a random order; compiles without a graph break) or
            "independent".

    >>> layer = randfuse.nn.SketchedLinear(16, 4, ratio=0.5)
    >>> layer(torch.randn(10, 16)).sum().backward()
    >>> layer.weight.grad.shape
    torch.Size([4, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        ratio: float = 1.0,
        method: str = "pivotal",
        **kw: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **kw)
        self.ratio = _checks.number("SketchedLinear", "ratio", ratio, 1e-9, 1.0)
        _checks.choice("SketchedLinear", "method", method, METHODS)
        self.method, self.track, self.variance = method, False, 0.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.weight.requires_grad or (self.ratio >= 1 and not self.track):
            return super().forward(x)
        return sampled_linear(self, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio:g}, method={self.method}"
