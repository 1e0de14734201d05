"""Does dropout help a low-rank adapter? Fine-tuning a small digit classifier for a new domain from few examples.

A network is trained on handwritten digits (bundled with scikit-learn), then meets the same digits turned by 90 degrees
and has a few labelled ones to adapt to. Plain fine-tuning moves every weight; LoRA moves two thin factors beside each
frozen layer. Claims, of Hu et al. (arXiv:2106.09685) and Lin et al. (arXiv:2404.09610): the adapter needs far fewer
parameters, and dropout, on its input or on its factors, keeps it from fitting the few examples too well. Measured on
held-out digits, over seeds; adapters get a learning rate of 3e-3 and plain fine-tuning 1e-3.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import randfuse
import torch
import torch.nn.functional as F
from randfuse.nn import LoRALinear
from torch import Tensor, nn

WIDTH, RANK, FEW, STEPS = 256, 8, 60, 300
LAYERS = (0, 2, 4)


def digits() -> tuple[Tensor, Tensor]:
    """1797 images (n, 8, 8) in [0, 1] and their labels, shuffled."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def fit(model: nn.Module, x: Tensor, y: Tensor, rate: float, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        batch = torch.randint(len(y), (min(len(y), 64),))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def test(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and cross entropy."""
    logits = model.eval()(x)
    return (logits.argmax(-1) == y).float().mean().item(), F.cross_entropy(logits, y).item()


def adapted(base: nn.Sequential, p: float, drop: str) -> nn.Sequential:
    model = copy.deepcopy(base)
    for i in LAYERS:
        model[i] = LoRALinear.from_linear(model[i], r=RANK, lora_alpha=2 * RANK, p=p, drop=drop)
    return model.train()


def ensemble(model: nn.Sequential, samples: int = 16) -> nn.Sequential:
    """The test-time ensemble of LoRA Dropout, layer by layer: one adapter of rank samples * r each."""
    model = copy.deepcopy(model)
    for i in LAYERS:
        layer = model[i]
        factors = layer.lora_A.weight, layer.lora_B.weight
        a, b = randfuse.lora_ensemble(*factors, layer.p, samples, key=randfuse.key(i))
        layer.lora_A.weight, layer.lora_B.weight = nn.Parameter(a), nn.Parameter(b)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2, for the standard deviations")
    seeds = range(parser.parse_args().seeds)
    if len(seeds) < 2:
        parser.error(f"--seeds must be at least 2, got {len(seeds)}")
    torch.set_num_threads(1)  # the model is too small to share out
    images, labels = digits()
    x, turned = images.flatten(1), images.rot90(1, (1, 2)).flatten(1)
    pretraining, held_out = slice(0, 900), slice(1200, None)
    torch.manual_seed(0)
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)]
    base = fit(nn.Sequential(*layers), x[pretraining], labels[pretraining], 1e-3, 600)
    far = test(base, turned[held_out], labels[held_out])
    print(
        f"pretrained: {test(base, x[held_out], labels[held_out])[0]:.1%} upright, {far[0]:.1%} turned; {FEW} examples\n"
    )

    methods = {"plain fine-tuning": lambda: copy.deepcopy(base).train()}
    for name, drop, p in (
        ("LoRA", "input", 0.0),
        ("LoRA, lora_dropout 0.1", "input", 0.1),
        ("LoRA, lora_dropout 0.3", "input", 0.3),
        ("LoRA Dropout 0.1", "factors", 0.1),
        ("LoRA Dropout 0.3", "factors", 0.3),
    ):
        methods[name] = lambda drop=drop, p=p: adapted(base, p, drop)
    start = time.perf_counter()
    print(f"{'':28} {'trained':>8} {'accuracy':>16} {'cross entropy':>16}")
    losses = {}
    for name, make in methods.items():
        models = []
        for seed in seeds:
            torch.manual_seed(seed)
            few = 900 + torch.randperm(300)[:FEW]
            models.append(fit(make(), turned[few], labels[few], 1e-3 if name.startswith("plain") else 3e-3, STEPS))
        results = [test(m, turned[held_out], labels[held_out]) for m in models]
        losses[name] = show(name, models[0], results)
        if "Dropout" in name:
            show(
                "  ensemble of 16 masks", None, [test(ensemble(m), turned[held_out], labels[held_out]) for m in models]
            )
    print(
        f"\nheld-out cross entropy of LoRA: {losses['LoRA']:.3f} without dropout; every variant with it, none selected:"
    )
    for name in losses:
        if "ropout" in name:
            print(f"  {name:26} {losses[name]:.3f} ({losses[name] - losses['LoRA']:+.3f})")
    print(f"{time.perf_counter() - start:.0f} s, {len(seeds)} seeds; mean ± standard deviation over seeds")


def show(name: str, model: nn.Module | None, results: list[tuple[float, float]]) -> float:
    count = "" if model is None else f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"
    accuracy, loss = zip(*results, strict=True)
    mean = statistics.mean
    a = f"{mean(accuracy):.1%} ± {statistics.stdev(accuracy):.1%}"
    print(f"{name:28} {count:>8} {a:>16} {mean(loss):>8.3f} ± {statistics.stdev(loss):.3f}", flush=True)
    return mean(loss)


if __name__ == "__main__":
    main()
