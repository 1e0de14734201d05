"""Early dropout (Liu et al., "Dropout Reduces Underfitting", ICML 2023) on a small transformer that underfits a text.

Claim: dropout in the first part of training lowers the variance of the directions of mini-batch gradients, and a model
that underfits then ends with a lower training loss, dropout having been switched off. The variance is the mean of
(1 - cosine)/2 over pairs of gradients of batches at one and the same weights, dropout as in training. Prints what was
measured, whichever way it comes out: the paper's models are larger by orders of magnitude than this one.

    python examples/early_dropout.py
"""

from __future__ import annotations

import time
from pydoc_data import topics

import randfuse
import torch
import torch.nn.functional as F
from randfuse import testing
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 48, 4, 2, 48, 32
P, STEPS, EARLY, SEEDS = 0.1, 300, 120, range(2)
PROBE_EVERY, PROBES = 30, 8  # batches whose gradients are compared


def corpus() -> Tensor:
    return torch.tensor(
        list("\n".join(topics.topics[name] for name in sorted(topics.topics)).encode("ascii", "replace"))
    )


def batch(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    start = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
    words = text[start + torch.arange(CONTEXT + 1)]
    return words[:, :-1], words[:, 1:]


class Block(nn.Module):
    """Attention and a feed-forward part; what each adds to the stream is dropped, residual and all in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.out = randfuse.nn.LinearDropout(WIDTH, WIDTH, p=P)
        self.down = randfuse.nn.LinearDropout(4 * WIDTH, WIDTH, p=P)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = self.out(seen, residual=x)
        return self.down(F.gelu(self.up(self.before_mlp(x))), residual=x)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(128, WIDTH), nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)

    def loss(self, words: Tensor, following: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embed(words) + self.place)))
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def direction_variance(model: Transformer, text: Tensor) -> float:
    generator, gradients = torch.Generator().manual_seed(0), []
    for _ in range(PROBES):
        grads = torch.autograd.grad(model.loss(*batch(text, generator)), list(model.parameters()))
        gradients.append(F.normalize(torch.cat([g.flatten() for g in grads]), dim=0))
    cosines = torch.stack(gradients) @ torch.stack(gradients).T
    return ((1 - cosines).sum() / (2 * PROBES * (PROBES - 1))).item()


def run(p: float, seed: int, text: Tensor) -> tuple[float, float]:
    """Mean direction variance over the first EARLY steps, and the training loss of the last steps without dropout."""
    torch.manual_seed(seed)
    model = Transformer()
    schedule = randfuse.nn.DropoutSchedule(model, p=p, steps=EARLY, mode="early")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    variances, last = [], []
    for step in range(STEPS):
        schedule.step()
        if step < EARLY and step % PROBE_EVERY == PROBE_EVERY - 1:
            variances.append(direction_variance(model, text))
        loss = model.loss(*batch(text, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 50) * (1 - step / STEPS)
        optimizer.step()
        if step >= STEPS - 50:
            with torch.no_grad():
                last.append(model.eval().loss(*batch(text, generator)).item())
                model.train()
    return sum(variances) / len(variances), sum(last) / len(last)


def main() -> None:
    testing.guard_onednn()
    print("claim     dropout early in training lowers the variance of gradient directions, and the final training loss")
    text, start = corpus(), time.perf_counter()
    print(f"{len(text)} bytes, {LAYERS} layers of {WIDTH}, {STEPS} steps, p = {P} in the first {EARLY}\n")
    print(f"{'':16} {'direction variance':>20} {'training loss':>16}   of {len(SEEDS)} seeds")
    results = {}
    for name, p in (("no dropout", 0.0), ("early dropout", P)):
        runs = torch.tensor([run(p, seed, text) for seed in SEEDS])
        results[name] = runs
        shown = [f"{c.mean():.3f} ({c.min():.3f}-{c.max():.3f})" for c in runs.T]
        print(f"{name:16} {shown[0]:>20} {shown[1]:>20}")
    lower = (results["early dropout"] < results["no dropout"]).sum(0).tolist()
    for figure, seeds in zip(("direction variance", "training loss"), lower, strict=True):
        verdict = "as claimed" if seeds == len(SEEDS) else "the claim does not hold at this size"
        print(f"measured  {figure} lower with early dropout for {seeds} of {len(SEEDS)} seeds: {verdict}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
