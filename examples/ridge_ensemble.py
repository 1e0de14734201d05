"""Sketched ridge ensembles (Patil, LeJeune, ICLR 2024) on the diabetes data, all products of three measurements.

Claim: generalised cross-validation of an ensemble of sketched ridge regressions estimates its error on new data, for
every penalty and number of members; and the ensemble trick tells, from a few members, what infinitely many would give.
"""

from __future__ import annotations

import randfuse
import torch
from randfuse import sketch
from torch import Tensor

SPLITS, TRAIN, SIZE = 12, 300, 140


def diabetes() -> tuple[Tensor, Tensor]:
    """442 patients, 285 standardised monomials of up to three of 10 measurements; progression of the disease."""
    from sklearn.datasets import load_diabetes
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    data = load_diabetes()
    x = StandardScaler().fit_transform(PolynomialFeatures(3, include_bias=False).fit_transform(data.data * 20))
    return torch.tensor(x), torch.tensor(data.target)


def main() -> None:
    print("claim     GCV of K sketched ridge regressions estimates their error on new data, for every penalty and K\n")
    x, y = diabetes()
    lambdas = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    rows = {k: [] for k in (1, 4, 16)}
    for split in range(SPLITS):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split))
        train, test = order[:TRAIN], order[TRAIN:]
        for members in rows:
            model = sketch.RidgeEnsemble(SIZE, members, key=randfuse.key(split)).fit(x[train], y[train], lambdas)
            predictions = torch.stack([model.predict(x[test], which) for which in range(len(lambdas))])
            held_out = (predictions - y[test]).square().mean(1)
            low, high = model.interval(x[test], 0.9)
            covered = ((low < y[test]) & (y[test] < high)).double().mean()
            rows[members].append((model.gcv, held_out, model.gcv_limit, covered, held_out[model.best]))
    print(f"{SPLITS} splits, {TRAIN} to train, {x.shape[1]} features sketched to {SIZE}; mean squared errors:\n")
    print("penalty        " + "".join(f"{lam:9g}" for lam in lambdas))
    means = {}
    for members, results in rows.items():
        gcv, held_out, limit, covered, chosen = (torch.stack(part).mean(0) for part in zip(*results, strict=True))
        means[members] = gcv, held_out, limit, covered, chosen
        for name, values in ((f"K={members:<2} GCV", gcv), ("     held out", held_out)):
            print(f"{name:15}" + "".join(f"{float(v):9.0f}" for v in values))
    print(f"{'limit from K=4':15}" + "".join(f"{float(v):9.0f}" for v in means[4][2]))
    off = torch.stack([(g / h - 1).abs() for g, h, *_ in means.values()]).amax(0)  # of the members, a penalty
    gcv, _, _, covered, chosen = means[16]
    small, large = float(off[0]), float(off[3:].max())
    print(f"\nmeasured  GCV is off by {small:.0%} at the smallest penalty, by at most {large:.0%} from penalty 1 on;")
    print(f"          its penalty for 16 members gives {float(chosen):.0f}")
    print(f"          (the mean of y gives {float(y.var()):.0f}), and 90 % intervals hold {float(covered):.1%}")


if __name__ == "__main__":
    main()
