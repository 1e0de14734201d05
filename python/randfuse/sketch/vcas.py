"""Variance-controlled adaptive sampling of gradients: samples of a batch, tokens of a weight's gradient, and how many.

Backward passes are linear in the gradient that arrives, so a sample of it, each kept part divided by its probability,
leaves every gradient unbiased. Wang, Chen, Zhu, "Efficient backpropagation with variance-controlled adaptive sampling",
ICLR 2024 (arXiv 2402.17227).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .sampling import draw_positive

METHODS = ("independent", "pivotal")  # tokens are ordered, and systematic sampling must not meet an order


class _Sampled(torch.autograd.Function):
    """y, unchanged; backward keeps k of its N samples, in proportion to the norms of their gradients, which `tracker`
    is told. Numbers and not the module are arguments, so that compiled code can take them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, key: Tensor, ratio: float, method: str, tracker: GradientSampler | None) -> Tensor:
        ctx.save_for_backward(key)
        ctx.ratio, ctx.method, ctx.tracker = ratio, method, tracker
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (key,) = ctx.saved_tensors
        norms = grad.flatten(1).norm(dim=1, dtype=torch.float64)
        if ctx.tracker is not None:
            ctx.tracker.norms = norms.detach()
        if ctx.ratio >= 1:
            return grad, None, None, None, None
        k = max(1, int(len(norms) * ctx.ratio))
        rows, p = draw_positive(norms, k, ctx.method, key)
        factor = torch.zeros_like(norms).index_copy(0, rows, 1 / p[rows]).to(grad.dtype)
        return grad * factor.view(-1, *[1] * (grad.dim() - 1)), None, None, None, None


class GradientSampler(nn.Module):
    """The identity, whose backward keeps a share `ratio` of the samples (dim 0) of the gradient, unbiased.

    Put one after each block of a network; what lies before it then works on gradients most of which are 0.

    Args:
        ratio: kept share ρ in (0, 1]; 1 does nothing.
        method: "pivotal" (exactly int(N ρ) samples) or "independent".

    >>> sampler = GradientSampler(0.25)
    >>> x = torch.ones(8, 3, requires_grad=True)
    >>> sampler(x).sum().backward()
    >>> int((x.grad.sum(1) > 0).sum())
    2
    """

    def __init__(self, ratio: float = 1.0, method: str = "pivotal") -> None:
        super().__init__()
        self.ratio = _checks.number("GradientSampler", "ratio", ratio, 1e-9, 1.0)
        _checks.choice("GradientSampler", "method", method, METHODS)
        self.method, self.track, self.norms = method, False, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not x.requires_grad or (self.ratio >= 1 and not self.track):
            return x
        key = _checks.key_for("GradientSampler", None, None, x.device)
        return _Sampled.apply(x, key, self.ratio, self.method, self if self.track else None)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio:g}, method={self.method}"


class _SampledWeightGradient(torch.autograd.Function):
    """y, unchanged; backward gives the weight Σ (1/p) g xᵀ over the k tokens drawn by ‖g‖‖x‖, and y its gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, key: Tensor, ratio: float, method: str, tracker: Any
    ) -> Tensor:
        ctx.save_for_backward(x, key)
        ctx.ratio, ctx.method, ctx.tracker, ctx.dtype = ratio, method, tracker, weight.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, key = ctx.saved_tensors
        g, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        weights = g.norm(dim=1, dtype=torch.float64) * x.norm(dim=1, dtype=torch.float64)
        if ctx.ratio >= 1:
            rows, p = torch.arange(len(weights), device=g.device), torch.ones_like(weights)
        else:
            rows, p = draw_positive(weights, max(1, int(len(weights) * ctx.ratio)), ctx.method, key)
        if ctx.tracker is not None:  # of independent draws; rivals have no more
            ctx.tracker.variance = ((1 / p - 1) * weights.square()).sum()
        scaled = g[rows] * (1 / p[rows]).to(g.dtype).unsqueeze(1)
        return grad, None, (scaled.T @ x[rows].to(g.dtype)).to(ctx.dtype), None, None, None, None


def sampled_linear(layer: Any, x: Tensor) -> Tensor:
    """What `nn.SketchedLinear` computes: `F.linear`, the gradient of the weight from a sample of the tokens."""
    y = nn.functional.linear(x, layer.weight.detach(), layer.bias)
    key = _checks.key_for("SketchedLinear", None, None, x.device)
    tracker = layer if layer.track else None
    return _SampledWeightGradient.apply(y, x.detach(), layer.weight, key, layer.ratio, layer.method, tracker)


class VarianceController:
    """Chooses the ratios of a model's `GradientSampler`s and `nn.SketchedLinear`s, so that sampling adds little to the
    variance that batches have anyway.

    Every hundred steps or so call `update`. It runs `repeats` batches exactly and as many times sampled, and then
        s ± step, up if V_act > tolerance · V_sgd;  ρₗ = the least share of samples whose norms make up s of the sum,
        never less than in the layers before, and averaged with the old one by `decay`;
        νₗ / shrink if Vₗ > tolerance · V_sgd,ₗ, else νₗ · shrink.
    V_sgd is the variance of the exact gradient between batches, V_act what sampling of activations adds, Vₗ what
    sampling of the tokens of layer l adds.

    Args:
        model: samplers and layers are taken in the order of its modules.
        tolerance: of both variances, relative to V_sgd.
        step, decay, shrink: as above.
        repeats: M, batches and repetitions of each.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tolerance: float = 0.025,
        step: float = 0.01,
        decay: float = 0.6,
        shrink: float = 0.95,
        repeats: int = 2,
    ) -> None:
        op = "VarianceController"
        self.model = model
        self.samplers = [m for m in model.modules() if isinstance(m, GradientSampler)]
        self.layers: list[Any] = [m for m in model.modules() if hasattr(m, "weight") and hasattr(m, "track")]
        if not self.samplers and not self.layers:
            raise ValueError(f"{op}: model must have a GradientSampler or a SketchedLinear, got neither")
        self.tolerance = _checks.number(op, "tolerance", tolerance, 0.0)
        self.step, self.decay = _checks.number(op, "step", step, 0.0, 1.0), _checks.number(op, "decay", decay, 0.0, 1.0)
        self.shrink = _checks.number(op, "shrink", shrink, 1e-9, 1.0)
        self.repeats = _checks.whole(op, "repeats", repeats, 2, 2**16)
        self.s = 1.0

    def update(self, backward: Callable[[int], Any]) -> dict[str, float]:
        """Adapt the ratios. `backward(i)` runs forward and backward on batch i of `repeats` and leaves gradients in the
        parameters, whose old gradients are kept aside meanwhile. Returns the variances, for a log."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        aside = [p.grad for p in parameters]
        ratios = [m.ratio for m in (*self.samplers, *self.layers)]
        exact, norms, added, own = [], [], [], []
        for batch in range(self.repeats):
            self._set([1.0] * len(ratios), track=True)
            exact.append(self._gradient(backward, batch, parameters))
            norms.append([m.norms for m in self.samplers])
            self._set(ratios[: len(self.samplers)] + [1.0] * len(self.layers), track=False)
            for _ in range(self.repeats):
                sampled = self._gradient(backward, batch, parameters)
                added.append(sum(_square(a - b) for a, b in zip(sampled, exact[-1], strict=True)))
            self._set([1.0] * len(self.samplers) + ratios[len(self.samplers) :], track=True)
            self._gradient(backward, batch, parameters)
            own.append([float(m.variance) for m in self.layers])
        self._set(ratios, track=False)
        for p, grad in zip(parameters, aside, strict=True):
            p.grad = grad
        between = [
            _square(torch.stack(g) - torch.stack(g).mean(0)) / (len(exact) - 1) for g in zip(*exact, strict=True)
        ]
        v_sgd, v_act = sum(between), sum(added) / len(added)
        if self.samplers:
            self.s = min(1.0, max(0.0, self.s + (self.step if v_act > self.tolerance * v_sgd else -self.step)))
            least = 0.0
            for index, sampler in enumerate(self.samplers):
                needed = [_share(n[index], self.s) for n in norms]
                least = max(least, sum(needed) / len(needed))
                sampler.ratio = self.decay * sampler.ratio + (1 - self.decay) * least
        places = {id(p): i for i, p in enumerate(parameters)}
        for index, layer in enumerate(self.layers):
            over = sum(v[index] for v in own) / len(own) > self.tolerance * between[places[id(layer.weight)]]
            layer.ratio = min(1.0, layer.ratio / self.shrink) if over else layer.ratio * self.shrink
        return {"sgd": v_sgd, "activations": v_act, "weights": sum(sum(v) for v in own) / len(own), "s": self.s}

    def _set(self, ratios: list[float], track: bool) -> None:
        for module, ratio in zip((*self.samplers, *self.layers), ratios, strict=True):
            module.ratio, module.track = ratio, track

    def _gradient(self, backward: Callable[[int], Any], batch: int, parameters: list[nn.Parameter]) -> list[Tensor]:
        for p in parameters:
            p.grad = None
        backward(batch)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def _share(norms: Tensor, s: float) -> float:
    """The least n / N for which the n largest norms make up `s` of their sum."""
    sums = norms.sort(descending=True).values.cumsum(0)
    return min(1.0, (int((sums < s * sums[-1]).sum()) + 1) / len(norms))
