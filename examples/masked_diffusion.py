"""Does 32-bit noise lower the temperature of a masked diffusion model, and what do exact samplers cost?

A small model of words learns the text of Python's own library by masked diffusion and writes new text, with MDLM's
sampler in float32, the same in float64 (everyone's remedy), and with randfuse. Claims, of Zheng et al.
(arXiv:2409.02908): float32 Gumbel noise silently sharpens the law of the tokens, the more so the more steps there are;
first-hitting sampling needs as many model calls as there are positions. Measured: tokens a second; and −log p of each
token when it is drawn minus the entropy of the law it is drawn from, 0 on average for an exact sampler. The predicted
shift stands beside it: a run of this size has a standard error of 0.08. Writes masked_diffusion.png.
"""

from __future__ import annotations

import argparse
import collections
import re
import sysconfig
import time
from pathlib import Path

import torch
from randfuse import masked_diffusion as md
from randfuse.testing import guard_onednn
from torch import Tensor, nn

WORDS, LENGTH, BATCH, WIDTH = 2048, 64, 8, 128
MASK, VOCAB = WORDS, WORDS + 1


def text() -> tuple[Tensor, list[str]]:
    """Word ids of Python's library and the WORDS commonest words; 0 is any other."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    raw = "".join(f.read_text(errors="replace") for f in files)[:4_000_000]
    words = re.findall(r"\w+|[^\w\s]|\n *", raw)
    names = ["…"] + [w for w, _ in collections.Counter(words).most_common(WORDS - 1)]
    ids = {w: i for i, w in enumerate(names)}
    return torch.tensor([ids.get(w, 0) for w in words]), names


class Model(nn.Module):
    """Two transformer layers; asked for some rows, it runs its head on those alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.zeros(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.trunk = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.calls, self.asked = 0, (torch.empty(0, dtype=torch.int64), torch.empty(0, VOCAB))

    def forward(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        self.calls += 1
        hidden = self.trunk(self.embed(tokens) + self.place)
        if rows is None:
            return self.head(hidden)
        self.asked = rows, self.head(hidden.flatten(0, 1)[rows])
        return self.asked[1]


def train(model: Model, ids: Tensor, seconds: float) -> float:
    """Loss at the end, nats a word."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    end, last = time.time() + seconds, collections.deque(maxlen=50)
    while time.time() < end:
        starts = torch.randint(len(ids) - LENGTH, (32, 1))
        x = ids[starts + torch.arange(LENGTH)]
        t = md.sample_times(x)
        noisy = md.corrupt(x, t, mask_id=MASK)
        loss = md.loss(model(noisy), x, noisy, t, mask_id=MASK)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last.append(loss.item())
    return sum(last) / len(last)


class Surprise:
    """−log p − H of the tokens drawn, and their laws with the step they were drawn in."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.laws: list[tuple[float, Tensor]] = []

    def note(self, logits: Tensor, drawn: Tensor, steps_left: float) -> None:
        logp = logits[:, :WORDS].log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        self.values.append(-logp.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) - entropy)
        self.laws.append((steps_left, logp.exp().double()))

    def mean(self) -> tuple[float, float]:
        x = torch.cat(self.values)
        return float(x.mean()), float(x.std() / len(x) ** 0.5)


@torch.no_grad()
def mdlm(model: Model, dtype: torch.dtype, steps: int, run: int) -> tuple[float, Surprise]:
    """MDLM's cached sampler, Gumbel-max over [MASK] and all words in `dtype`: seconds a step of the first `run`."""
    x, surprise, logits = torch.full((BATCH, LENGTH), MASK), Surprise(), None
    begin = time.time()
    for k in range(run):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        if logits is None:  # kept while nothing changes
            logits = model(x)
            logits[..., MASK] = -torch.inf
            p = logits.softmax(-1)
        q = p * (t - s)
        q[..., MASK] = s
        q = q.to(dtype)
        drawn = (q / (1e-10 - (torch.rand_like(q) + 1e-10).log())).argmax(-1)
        new = torch.where(x == MASK, drawn, x)
        changed = new != x
        if changed.any():
            surprise.note(logits[changed], new[changed], steps - k)
            logits = None
        x = new
    return (time.time() - begin) / run, surprise


@torch.no_grad()
def exact(model: Model, method: str, steps: int, runs: int = 1) -> tuple[float, Surprise, Tensor]:
    """The same by randfuse: seconds for a batch of texts, of `runs` batches."""
    start, surprise = torch.full((BATCH, LENGTH), MASK), Surprise()

    def note(step: int, tokens: Tensor) -> None:
        rows, logits = model.asked
        surprise.note(logits, tokens.flatten()[rows], max(steps - step, 1))

    begin = time.time()
    for _ in range(runs):
        out = md.generate(model, start, mask_id=MASK, method=method, steps=steps, callback=note)
    return (time.time() - begin) / runs, surprise, out


def predicted(laws: list[tuple[float, Tensor]], steps: int, of: int) -> float:
    """Mean shift by float32 noise, a lattice of 2⁻²⁴: of a class of probability π it leaves a/(eᵃ − 1), a = 2⁻²⁴/π.

    A word's class has π = p/j with j steps to go: the shift grows with the number of steps.
    """
    shifts = []
    for left, p in laws:
        a = 2.0**-24 * max(left * steps / of, 1.0) / p
        q = p * (a / torch.expm1(a)).where(a < 700, 0.0)
        q = q / q.sum(-1, keepdim=True)
        shifts.append(((p - q) * p.log()).sum(-1))
    return float(torch.cat(shifts).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of training")
    parser.add_argument("--steps", type=int, default=1000, help="of ancestral sampling")
    parser.add_argument("--quick", action="store_true", help="a look: 5 s of training, 100 steps")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.steps = 5.0, 100
    guard_onednn()
    torch.manual_seed(0)
    ids, names = text()
    model = Model()
    print(f"training on {len(ids)} words for {args.seconds:.0f} s", flush=True)
    print(f"loss {train(model, ids, args.seconds):.2f} nats a word (uniform: {torch.tensor(WORDS).log():.2f})")
    model.eval()
    n, steps = BATCH * LENGTH, args.steps
    exact(model, "first_hitting", steps)  # warm
    results: dict[str, tuple[float, Surprise, int]] = {}
    for name, dtype, run in (("float32 Gumbel", torch.float32, steps), ("float64 Gumbel", torch.float64, steps // 4)):
        model.calls = 0
        each, surprise = mdlm(model, dtype, steps, run)
        results[name] = each * steps, surprise, model.calls * steps // run
    for method, runs in (("ancestral", 1), ("first_hitting", 8)):
        model.calls = 0
        seconds, surprise, out = exact(model, method, steps, runs)
        results[f"randfuse {method.replace('_', ' ')}"] = seconds, surprise, model.calls // runs
    print(f"\n{n} words, {steps} steps       {'tokens/s':>9} {'calls':>6}   -log p - H (0 if exact)")
    for name, (seconds, surprise, calls) in results.items():
        mean, error = surprise.mean()
        print(f"{name:24} {n / seconds:13.0f} {calls:6d}   {mean:+.3f} ± {error:.3f}")
    print("float64 Gumbel ran the first quarter of its steps: times four; first hitting wrote eight batches")
    laws = results["randfuse ancestral"][1].laws
    print(f"predicted for float32 at {steps} steps: {predicted(laws, steps, steps):+.3f}")
    base = results["float64 Gumbel"][0]
    print(f"against float64 Gumbel: ancestral {base / results['randfuse ancestral'][0]:.0f} times as fast, "
          f"first hitting {base / results['randfuse first hitting'][0]:.0f} times")  # fmt: skip
    print("\na text:", " ".join(" ".join(names[i] for i in out[0].tolist()).split()))
    plot(results, laws, steps)


def plot(results: dict[str, tuple[float, Surprise, int]], laws: list[tuple[float, Tensor]], steps: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    grid = [10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000]
    left.plot(grid, [predicted(laws, g, steps) for g in grid], color="C3", label="float32 Gumbel, predicted")
    left.axhline(0, color="0.6", linewidth=0.8)
    for i, (name, (_, surprise, _)) in enumerate(results.items()):
        mean, error = surprise.mean()
        at = steps * 1.12 ** (i - 1.5)  # side by side
        left.errorbar(at, mean, 2 * error, fmt="o", color=f"C{(3, 1, 0, 2)[i]}", capsize=3, label=name)
    left.set(xscale="log", xlabel="steps", ylabel="−log p − entropy of drawn words, nats")
    left.set_title("Float32 noise lowers the temperature")
    left.legend(fontsize=8)
    names = list(results)
    speed = [BATCH * LENGTH / results[name][0] for name in names]
    bars = right.barh(names[::-1], speed[::-1], color=["C2", "C0", "C1", "C3"])
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.set(xscale="log", xlabel=f"tokens a second, {steps} steps, {BATCH} texts of {LENGTH} words")
    right.margins(x=0.15)
    right.set_title("Same model, same machine")
    figure.savefig("masked_diffusion.png", dpi=120)
    print("wrote masked_diffusion.png")


if __name__ == "__main__":
    main()
