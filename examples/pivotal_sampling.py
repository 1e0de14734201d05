"""Dependent leverage-score sampling (Shimizu, Cheng, Musco, Weare, ICLR 2024) of a photograph.

Claim: to fit a function from few of its values, places drawn by their leverage scores but repelling each other (pivotal
sampling along a space-filling order) give a smaller error than independent ones. The function is the brightness of a
photograph, fitted by polynomials in its two coordinates; the error is that over the best fit to all pixels.
"""

from __future__ import annotations

import randfuse
import torch
from randfuse import sketch
from torch import Tensor

DEGREE, DRAWS = 9, 50


def photograph() -> tuple[Tensor, Tensor]:
    """Brightness (m,) on a grid of 53 × 80 pixels and their coordinates (m, 2) in [-1, 1]."""
    from sklearn.datasets import load_sample_image

    image = torch.tensor(load_sample_image("china.jpg")[::8, ::8].mean(-1)) / 255
    axes = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in image.shape)
    return image.flatten().double(), torch.cartesian_prod(*axes)


def polynomials(place: Tensor) -> Tensor:
    """All products of powers of total degree at most DEGREE, (m, 55)."""
    powers = [place**degree for degree in range(DEGREE + 1)]
    pairs = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
    return torch.stack([powers[i][:, 0] * powers[j][:, 1] for i, j in pairs], 1)


def space_filling(place: Tensor) -> Tensor:
    """Morton order: neighbours on the curve are neighbours in the picture."""
    cell = ((place + 1) / 2 * 1023).long()
    code = sum(((cell[:, axis] >> bit) & 1) << (2 * bit + axis) for bit in range(10) for axis in (0, 1))
    return code.argsort()


def main() -> None:
    print("claim     pixels that repel each other fit better than independent ones drawn by the same leverage scores\n")
    y, place = photograph()
    a = polynomials(place)
    scores, order = sketch.leverage_scores(a), space_filling(place)
    best = (a @ torch.linalg.lstsq(a, y[:, None]).solution - y[:, None]).square().sum()
    ways = {
        "uniform": (torch.ones_like(scores), {"method": "independent"}),
        "leverage": (scores, {"method": "independent"}),
        "pivotal": (scores, {"method": "pivotal", "order": order}),
    }
    print(f"{len(y)} pixels, {a.shape[1]} polynomials; median error of {DRAWS} draws above the best fit's, in %:\n")
    print(f"{'pixels':>8}" + "".join(f"{name:>12}" for name in ways))
    ratios = []
    for k in (80, 120, 200, 400):
        medians = {}
        for name, (weights, options) in ways.items():
            errors = []
            for draw in range(DRAWS):
                s = sketch.sample_rows(weights, k, key=randfuse.key(draw), **options)
                fit = torch.linalg.lstsq(s @ a, s @ y[:, None], driver="gelsd").solution
                errors.append((a @ fit - y[:, None]).square().sum() / best - 1)
            medians[name] = float(torch.stack(errors).median()) * 100
        ratios.append(medians["leverage"] / medians["pivotal"])
        print(f"{k:8}" + "".join(f"{value:12.1f}" for value in medians.values()))
    print(f"\nmeasured  the excess is {1 / max(ratios):.2f} to {1 / min(ratios):.2f} times that of independent draws")


if __name__ == "__main__":
    main()
