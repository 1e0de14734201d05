"""Mixout (Lee, Cho, Kang, ICLR 2020) against plain fine-tuning of a small pretrained network, on handwritten digits.

Claim: fine-tuning on few and partly wrong labels overfits and forgets; going back to the pretrained weights at random,
each weight with probability p and anew at each step, keeps more of what was known. The network learns 900 clean digits;
then it gets 40 digits that are blurred sideways, a fifth of the labels random, and is judged on clean labels of both
kinds of image.
"""

from __future__ import annotations

import copy

import randfuse
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW, WRONG, STEPS, SEEDS = 40, 0.2, 150, 15


def digits() -> tuple[Tensor, Tensor]:
    """1797 images (n, 8, 8) in [0, 1] and labels, shuffled."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def blurred(x: Tensor) -> Tensor:
    return (x + x.roll(1, dims=2)) / 2


def network() -> nn.Sequential:
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


def with_mixout(model: nn.Sequential, p: float) -> nn.Sequential:
    """The same network, its linear layers anchored where they are."""
    make = randfuse.nn.MixoutLinear.from_linear
    return nn.Sequential(*(make(layer, p) if isinstance(layer, nn.Linear) else layer for layer in model))


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)  # the same batches for every method
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        rows = torch.randint(0, len(y), (batch,), generator=draws)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean()) * 100


def main() -> None:
    print("claim     fine-tuning with mixout is more often right on the new images than without, at one of three p\n")
    x, y = digits()
    torch.manual_seed(0)
    pretrained = network()
    fit(pretrained, x[:900], y[:900], 400, 64, 0)
    old, new = (x[1300:], y[1300:]), (blurred(x[1300:]), y[1300:])
    before = accuracy(pretrained, *new), accuracy(pretrained, *old)
    print(f"pretrained: {before[0]:.1f} % right on the new images, {before[1]:.1f} % on the old")
    print(f"fine-tuned on {FEW} new images, {WRONG:.0%} of the labels random; {SEEDS} seeds, standard errors:\n")
    print(f"{'':14} {'new images':>16} {'against plain':>16} {'worst seed':>11} {'old images':>11}")
    plain, gains = None, {}
    for p in (None, 0.5, 0.8, 0.9):
        scores = []
        for seed in range(SEEDS):
            choice = torch.Generator().manual_seed(seed)
            rows = 900 + torch.randperm(400, generator=choice)[:FEW]
            noise = torch.randint(0, 10, (FEW,), generator=choice)
            labels = torch.where(torch.rand(FEW, generator=choice) < WRONG, noise, y[rows])
            model = copy.deepcopy(pretrained)
            model = model if p is None else with_mixout(model, p)
            fit(model, blurred(x[rows]), labels, STEPS, 16, seed)
            scores.append((accuracy(model, *new), accuracy(model, *old)))
        got, kept = torch.tensor(scores).unbind(1)
        plain = got if plain is None else plain
        error = lambda s: float(s.std()) / SEEDS**0.5  # noqa: E731
        mean = float((got - plain).mean())
        gain = f"{mean:+.1f} ± {error(got - plain):.1f}"
        name = "plain" if p is None else f"mixout p={p}"
        figures = f"{float(got.mean()):9.1f} ± {error(got):.1f} {gain:>16}"
        print(f"{name:14} {figures} {float(got.min()):11.1f} {float(kept.mean()):11.1f}")
        if p is not None:
            gains[p] = mean, error(got - plain)
    best = max(gains, key=gains.__getitem__)
    mean, spread = gains[best]
    verdict = "as claimed" if mean > 2 * spread else "within two standard errors: the claim does not hold here"
    print(f"\nmeasured  mixout p={best} is right {mean:+.1f} ± {spread:.1f} points more often: {verdict}")


if __name__ == "__main__":
    main()
