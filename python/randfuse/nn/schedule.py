"""`DropoutSchedule`: p as a function of the training step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._tensor_p import HasP


class DropoutSchedule:
    """Drives the p of every layer of a model through training, without a recompilation or a reallocation.

    The layers' `p` become one shared 0-d float32 tensor that `step()` fills in place, so compiled code and captured
    graphs see the new value. Moving the model moves it; a model spread over several devices needs a schedule for each
    part. `deepcopy((model, schedule))` keeps the two together. With T = `steps`:

    * "early": p while step < T, 0 from then on;
    * "late": 0 while step < T, p from then on;
    * "linear": p·(1 − step/T), 0 from step T on;
    * "constant": p.

    Liu et al., "Dropout Reduces Underfitting", ICML 2023 (arXiv:2303.01500).

    Args:
        model: module whose layers with a `p` are driven.
        p: the probability to start from ("late": to end with), in [0, 1].
        steps: T, at least 1.
        mode: "early", "late", "linear" or "constant".
        layers: the layers to drive; by default all of randfuse's in `model` but those of granularity "column" or
            "block", whose p sets sizes and cannot be a tensor.

    Raises:
        ValueError: p, steps or mode outside the above, no layer to drive, or one without a p or of another granularity.

    >>> model = torch.nn.Sequential(randfuse.nn.DropoutLinear(8, 4))
    >>> schedule = randfuse.nn.DropoutSchedule(model, p=0.1, steps=2, mode="early")
    >>> [round(schedule.step(), 3) for _ in range(3)]
    [0.1, 0.0, 0.0]
    """

    def __init__(
        self, model: nn.Module, p: float, steps: int, mode: str = "early", layers: list[nn.Module] | None = None
    ) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"DropoutSchedule: p must be in [0, 1], got {p}")
        if steps < 1:
            raise ValueError(f"DropoutSchedule: steps must be at least 1, got {steps}")
        if mode not in ("early", "late", "linear", "constant"):
            raise ValueError(f"DropoutSchedule: mode must be 'early', 'late', 'linear' or 'constant', got {mode!r}")
        if layers is None:
            layers = [m for m in model.modules() if isinstance(m, HasP) and _granularity(m) == "element"]
        if not layers:
            raise ValueError("DropoutSchedule: model must have a layer of randfuse.nn with a p, got none")
        for layer in layers:
            if not hasattr(layer, "p"):
                raise ValueError(f"DropoutSchedule: layers must have a p, got {type(layer).__name__}")
            if _granularity(layer) != "element":
                raise ValueError(
                    f"DropoutSchedule: layers must have granularity 'element', got {_granularity(layer)!r},"
                    " for which p must be a float"
                )
        device = next((t.device for t in model.parameters()), torch.device("cpu"))
        self.p: Tensor = torch.zeros((), device="cpu" if device.type == "meta" else device)
        self.base, self.steps, self.mode, self.count = p, steps, mode, 0
        for layer in layers:
            layer.p = self.p
        self.p.fill_(self.value(0))

    def value(self, step: int) -> float:
        """p at a step."""
        before = step < self.steps
        return {
            "early": self.base * before,
            "late": self.base * (not before),
            "linear": self.base * max(0.0, 1 - step / self.steps),
            "constant": self.base,
        }[self.mode]

    def step(self) -> float:
        """Advance by one training step, after the optimiser's; returns the p of the next forward."""
        self.count += 1
        p = self.value(self.count)
        self.p.fill_(p)
        return p

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]
        self.p.fill_(self.value(self.count))


def _granularity(layer: nn.Module) -> str:
    return getattr(layer, "granularity", "element")
