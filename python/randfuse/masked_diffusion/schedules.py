"""Noise schedules: what part of a text is masked at time t, from 1 (all of it) to 0 (none)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Schedule(ABC):
    """m(t) = 1 − α_t, the probability that a position is masked at time t. Everything is float64 and elementwise.

    Steps use m and not α: of 1 − α nothing is left in floating point where t is small.
    """

    @abstractmethod
    def level(self, t: Tensor) -> Tensor:
        """m(t), increasing."""

    @abstractmethod
    def time(self, level: Tensor) -> Tensor:
        """The inverse of `level`."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """m′(t) / m(t): what the likelihood bound multiplies the cross entropy of masked positions by."""


@dataclass(frozen=True)
class LogLinear(Schedule):
    """α_t = 1 − (1 − eps)·t. MDLM trains with eps = 1e-3; eps = 0, the default, is the linear one of LLaDA.

    >>> LogLinear().level(torch.tensor(0.25))
    tensor(0.2500)
    """

    eps: float = 0.0

    def level(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * t

    def time(self, level: Tensor) -> Tensor:
        return level / (1 - self.eps)

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t


@dataclass(frozen=True)
class Polynomial(Schedule):
    """m(t) = t^power."""

    power: float = 2.0

    def level(self, t: Tensor) -> Tensor:
        return t**self.power

    def time(self, level: Tensor) -> Tensor:
        return level ** (1 / self.power)

    def weight(self, t: Tensor) -> Tensor:
        return self.power / t


@dataclass(frozen=True)
class Cosine(Schedule):
    """m(t) = cos(π(1 − t)/2), MaskGIT's."""

    def level(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).sin()

    def time(self, level: Tensor) -> Tensor:
        return level.asin() * (2 / math.pi)

    def weight(self, t: Tensor) -> Tensor:
        return (math.pi / 2) / (t * (math.pi / 2)).tan()


@dataclass(frozen=True)
class Geometric(Schedule):
    """α_t = exp(−σ), σ = sigma_min^(1−t) · sigma_max^t, SEDD's."""

    sigma_min: float = 1e-3
    sigma_max: float = 20.0

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def level(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._sigma(t))

    def time(self, level: Tensor) -> Tensor:
        return (-torch.log1p(-level) / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def weight(self, t: Tensor) -> Tensor:
        sigma = self._sigma(t)
        return sigma * math.log(self.sigma_max / self.sigma_min) / torch.expm1(sigma)


LINEAR = LogLinear()


def time_of(op: str, name: str, t: float | Tensor, tokens: Tensor) -> Tensor:
    """Time as float64 (1, 1) or (B, 1); values are checked where they can be read."""
    if isinstance(t, bool) or not isinstance(t, (int, float, Tensor)):
        raise TypeError(f"{op}: {name} must be a number or a Tensor, got {type(t).__name__}")
    if isinstance(t, Tensor):
        if t.dim() and t.shape != tokens.shape[:1]:
            raise ValueError(
                f"{op}: {name} must have shape () or (B,) = {tuple(tokens.shape[:1])}, got {tuple(t.shape)}"
            )
        return t.to(tokens.device, torch.float64).reshape(-1, 1)
    if not 0 <= t <= 1:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {t}")
    return torch.full((1, 1), float(t), dtype=torch.float64, device=tokens.device)


def times_of(op: str, t: float | Tensor, s: float | Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A step's two times, s ≤ t where both are numbers; of tensors nothing is decoded where s > t."""
    times = time_of(op, "t", t, tokens), time_of(op, "s", s, tokens)
    if not isinstance(t, Tensor) and not isinstance(s, Tensor) and s > t:
        raise ValueError(f"{op}: s must be at most t, got {s} after {t}")
    return times


def level_at(op: str, time: Tensor, schedule: Schedule) -> Tensor:
    """m(t). Time 0 is the end: nothing is masked there, whatever the schedule says."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{op}: schedule must be a Schedule, got {type(schedule).__name__}")
    return schedule.level(time).where(time > 0, 0.0)
