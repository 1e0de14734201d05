"""Sketched ridgeless regression (Chen, Zeng, Yang, Sun, ICML 2023) on handwritten digits.

Claim: least squares is at its worst where there are as many samples as features; sketching the samples to fewer rows
first removes the peak of the error, although it throws data away. The target is the digit, the features are 300 random
ReLU features of its 64 pixels.
"""

from __future__ import annotations

import randfuse
import torch
from randfuse import sketch
from torch import Tensor

FEATURES, REPEATS = 300, 8
SHARES = (0.15, 0.3, 0.5, 0.7, 1.0)


def digits() -> tuple[Tensor, Tensor]:
    """1797 images as (n, 300) random ReLU features and (n,) digits, both centred."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data / 16)
    weight = torch.randn(64, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features, target = torch.relu((x - x.mean(0)) @ weight), torch.tensor(data.target, dtype=torch.float64)
    return features - features.mean(0), target - target.mean()


def risk(x: Tensor, y: Tensor, samples: int, size: int, seed: int) -> float:
    """Test error of the least-norm solution after `samples` were sketched to `size` rows."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:samples], order[-700:]
    a, b = x[train], y[train].unsqueeze(1)
    if size < samples:
        s = sketch.SRDCT(size, samples, key=randfuse.key(seed))
        a, b = s @ a, s @ b
    beta = torch.linalg.lstsq(a, b, driver="gelsd").solution
    return float((x[test] @ beta - y[test].unsqueeze(1)).square().mean())


def main() -> None:
    print("claim     the error's peak, at as many samples as features, is gone if samples are sketched to fewer rows\n")
    x, y = digits()
    print(f"{FEATURES} features, mean test error over {REPEATS} draws; the target has variance {float(y.var()):.1f}:\n")
    print(
        f"{'samples':>8} {'all rows':>10} "
        + "".join(f"{f'to {share:.0%}':>9}" for share in SHARES[:-1])
        + "  best of these"
    )
    plain, best = [], []
    for samples in (60, 120, 200, 270, 300, 330, 400, 600, 1000):
        risks = {
            share: sum(risk(x, y, samples, int(share * samples), seed) for seed in range(REPEATS)) / REPEATS
            for share in SHARES
        }
        plain.append(risks[1.0])
        best.append(min(risks.values()))
        print(
            f"{samples:8} {risks[1.0]:10.2f} "
            + "".join(f"{risks[share]:9.2f}" for share in SHARES[:-1])
            + f"{best[-1]:12.2f}"
        )
    rise = max(b / min(best[: i + 1]) for i, b in enumerate(best))
    print(f"\nmeasured  with all rows the error is up to {max(plain) / plain[0]:.0f} times that of the fewest samples;")
    print(f"          with the best share it is never more than {rise:.2f} times that of fewer samples")
    size = sketch.optimal_sketch_size(FEATURES, FEATURES, signal=2.0, noise=1.0)
    print(f"          (theory for isotropic features and signal twice the noise: {FEATURES} samples to {size} rows)")


if __name__ == "__main__":
    main()
