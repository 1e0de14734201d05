"""Data attribution with compressed gradients (TRAK: Park et al., ICML 2023) on handwritten digits.

Claim: which training images a prediction rests on can be told from random projections of the gradients, a small part
of their size. A network is trained on 1000 digits; scores are kernel regression weights of gradients, exact and
projected by matrices that are never stored.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from randfuse.integrations.trak import Projector
from torch import Tensor, nn

TRAIN, TEST = 1000, 200


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def trained(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients (n, …) of log(p / (1 − p)) of the right class, by parameter."""

    def margin(parameters: dict[str, Tensor], x: Tensor, right: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (x.unsqueeze(0),)).squeeze(0)
        others = logits.masked_fill(right, -torch.inf)
        return logits.where(right, 0.0).sum() - others.logsumexp(0)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return torch.func.vmap(torch.func.grad(margin), (None, 0, 0))(parameters, x, F.one_hot(y, 10).bool())


def scores(train: Tensor, test: Tensor) -> Tensor:
    """test (GᵀG + ridge)⁻¹ trainᵀ, through the kernel of the training gradients: (TEST, TRAIN)."""
    kernel = train @ train.T
    return test @ train.T @ torch.linalg.inv(kernel + 0.1 * kernel.trace() / len(kernel) * torch.eye(len(kernel)))


def main() -> None:
    print("claim     projections of the gradients tell which training images a prediction rests on\n")
    x, y = digits()
    (x_train, x_test), (y_train, y_test) = ((t[:TRAIN], t[TRAIN : TRAIN + TEST]) for t in (x, y))
    model = trained(x_train, y_train)
    parts = [gradients(model, *data) for data in ((x_train, y_train), (x_test, y_test))]
    flat = [torch.cat([g.flatten(1) for g in part.values()], 1) for part in parts]
    size = flat[0].shape[1]
    exact = scores(*flat)
    print(
        f"{TRAIN} training images, {size} parameters; scores of {TEST} test images against those of whole gradients:\n"
    )
    print(f"{'projection':24} {'of the size':>11} {'seconds':>8} {'correlation':>12} {'same digit in top 10':>21}")
    result = {}
    for kind, dim in (("exact", size), ("sjlt", 512), ("sjlt", 2048), ("rademacher", 512), ("rademacher", 2048)):
        start = time.perf_counter()
        if kind == "exact":
            found = exact
        else:
            projector = Projector(size, dim, seed=0, proj_type=kind, scale="isometry")
            found = scores(*(projector.project(part) for part in parts))
        seconds = time.perf_counter() - start
        pairs = torch.stack((found, exact), 1)
        correlation = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean()
        same = (y_train[found.topk(10).indices] == y_test.unsqueeze(1)).double().mean()
        result[kind, dim] = float(correlation)
        name = kind if kind == "exact" else f"{kind} to {dim}"
        print(f"{name:24} {dim / size:>10.1%} {seconds:8.2f} {float(correlation):12.3f} {float(same):>21.1%}")
    print(f"\nmeasured  2048 numbers for {size} keep the scores to a correlation of {result['sjlt', 2048]:.3f} (sjlt)")
    print(f"          and {result['rademacher', 2048]:.3f} (dense)")


if __name__ == "__main__":
    main()
