"""Very large dropout (p = 0.9) in front of the head, with the exact scale, element by element and by columns.

Zhang and Bottou, "Fine-tuning with Very Large Dropout" (arXiv:2403.00946): fine-tuning with p ≈ 0.9 on the penultimate
representation gives features that serve better where the test data differ from the training data. Here: a small network
learns five of scikit-learn's digits, is fine-tuned on few images of all ten, and is tested on new images as they are
and on new images moved by half a pixel. Prints what was measured, whichever way it comes out.

    python examples/very_large_dropout.py
"""

from __future__ import annotations

import statistics
import time

import randfuse
import torch
import torch.nn.functional as F
from randfuse import testing
from sklearn.datasets import load_digits
from torch import Tensor, nn

WIDTH, P, SEEDS, FEW = 1024, 0.9, range(3), 100
HEADS = {
    "no dropout": {"p": 0.0},
    "element, p = 0.9": {"p": P},
    "column, p = 0.9": {"p": P, "granularity": "column"},
}


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def moved(x: Tensor) -> Tensor:
    """The images half a pixel to the left and half a pixel to the right."""
    images = x.reshape(-1, 8, 8)
    whole = torch.cat([F.pad(images, (0, 1))[:, :, 1:], F.pad(images, (1, 0))[:, :, :-1]])
    return ((whole + images.repeat(2, 1, 1)) / 2).flatten(1)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()


def run(seed: int, head: dict, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy on new images and on moved new images after fine-tuning."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, WIDTH), nn.ReLU())
    first = y[:900] < 5
    train(nn.Sequential(body, nn.Linear(WIDTH, 5)), x[:900][first], y[:900][first], 200, 0.05)
    model = nn.Sequential(body, randfuse.nn.DropoutLinear(WIDTH, 10, **head))
    train(model, x[900 : 900 + FEW], y[900 : 900 + FEW], 200, 0.01)
    new, labels = x[1000:], y[1000:]
    return accuracy(model, new, labels), accuracy(model, moved(new), labels.repeat(2))


def mean_of_draws(head: dict, draws: int = 2000) -> float:
    """The mean output of a dropped layer of ones, relative to the layer without dropout: 1 if the scale is right."""
    layer = randfuse.nn.DropoutLinear(WIDTH, 1, bias=False, **head)
    nn.init.ones_(layer.weight)
    with torch.no_grad():
        return statistics.mean(layer(torch.ones(1, WIDTH)).item() for _ in range(draws)) / WIDTH


def step_time(layer: nn.Module, rounds: int = 15) -> float:
    """Median milliseconds of forward and backward of 512 rows."""
    x, times = torch.randn(512, layer.in_features, requires_grad=True), []
    for _ in range(rounds):
        start = time.perf_counter()
        layer(x).sum().backward()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def main() -> None:
    testing.guard_onednn()
    x, y = digits()
    print("Claim: p = 0.9 in front of the head helps where test data differ (here: images moved by half a pixel).\n")
    print(f"{'fine-tuning with':20} {'new images':>16} {'moved':>16} {'mean of output':>16}")
    for name, head in HEADS.items():
        results = zip(*(run(seed, head, x, y) for seed in SEEDS), strict=True)
        cells = [f"{statistics.mean(r):.1%} ± {statistics.stdev(r):.1%}" for r in results]
        print(f"{name:20} {cells[0]:>16} {cells[1]:>16} {mean_of_draws(head):>16.4f}")
    eight_bits = (256 - round(P * 256)) / 256 / (1 - P)
    print(f"\nThe mean must be 1 (standard error 0.002 by elements); 8 bits and a nominal scale give {eight_bits:.4f}.")
    print("\nA layer 1024→1024, 512 rows, forward and backward:")
    dense = step_time(nn.Linear(WIDTH, WIDTH))
    print(f"  {'nn.Linear':20} {dense:7.1f} ms")
    for name, head in list(HEADS.items())[1:]:
        ms = step_time(randfuse.nn.DropoutLinear(WIDTH, WIDTH, **head))
        print(f"  {name:20} {ms:7.1f} ms, {dense / ms:.1f} times as fast")


if __name__ == "__main__":
    main()
