"""The main job on real data: `make demo`.

Trains two small classifiers, each once with `nn.Dropout` + `nn.Linear` and once with randfuse's layers: handwritten
digits (bundled with scikit-learn) and the next character of the source text that ships with Python. Shows that the
results agree within noise, what the layers cost, and that every backend makes the same decisions. Writes demo.png.
"""

from __future__ import annotations

import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import randfuse
import torch
import torch.nn.functional as F
from randfuse import _backends, testing
from torch import Tensor, nn

P, WIDTH, BATCH, SEEDS = 0.5, 1024, 512, (0, 1, 2)
CONTEXT, ALPHABET, EMBEDDING = 24, 97, 32


# --- data ----------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1797 images of 8x8: train inputs (n, 64) and labels, test inputs and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    return x[train], y[train], x[test], y[test]


def text() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of CONTEXT characters (n, CONTEXT) and the character that follows, from Python's own library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    raw = "".join(f.read_text(errors="replace") for f in files)[:1_500_000]
    codes = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in raw])  # 0: newline and the rest
    windows = codes.unfold(0, CONTEXT + 1, 5)
    cut = int(len(windows) * 0.95)  # the end of the text is held out
    return windows[:cut, :-1], windows[:cut, -1], windows[cut:, :-1], windows[cut:, -1]


# --- models --------------------------------------------------------------------------------------------------------


def head(features: int, classes: int, fused: bool) -> nn.Sequential:
    """Two hidden layers with dropout before every product but the first."""
    if fused:
        first = randfuse.nn.LinearDropout(features, WIDTH, p=P, activation="relu")
        hidden = nn.Linear(WIDTH, WIDTH)
        return nn.Sequential(first, hidden, nn.ReLU(), randfuse.nn.DropoutLinear(WIDTH, classes, p=P))
    layers = [nn.Linear(features, WIDTH), nn.ReLU(), nn.Dropout(P), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(P)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, classes))


def digit_model(fused: bool) -> nn.Module:
    return head(64, 10, fused)


def text_model(fused: bool) -> nn.Module:
    return nn.Sequential(nn.Embedding(ALPHABET, EMBEDDING), nn.Flatten(), head(CONTEXT * EMBEDDING, ALPHABET, fused))


# --- the runs ------------------------------------------------------------------------------------------------------


def train(make: Callable[[bool], nn.Module], fused: bool, data: tuple[Tensor, ...], steps: int, seed: int) -> dict:
    """Test accuracy, loss curve and seconds of one training run."""
    x, y, x_test, y_test = data
    torch.manual_seed(seed)
    model = make(fused)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order = torch.Generator().manual_seed(seed)
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        batch = torch.randint(len(y), (BATCH,), generator=order)
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(-1) == y_test).float().mean().item()
    return {"accuracy": accuracy, "losses": losses, "seconds": seconds}


def layer_times(rounds: int = 25) -> dict[str, tuple[float, float, float]]:
    """Median milliseconds of a training step of each layer: plain, fused and without dropout, interleaved."""
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    wide, narrow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def fused(cls: type[nn.Linear], plain: nn.Linear, **kwargs: object) -> nn.Module:
        layer = cls(plain.in_features, plain.out_features, p=P, **kwargs)
        layer.load_state_dict(plain.state_dict())
        return layer

    cases = {
        "Dropout, Linear 1024→1024": (
            nn.Sequential(nn.Dropout(P), wide),
            fused(randfuse.nn.DropoutLinear, wide),
            wide,
        ),
        "Dropout, Linear 1024→10": (
            nn.Sequential(nn.Dropout(P), narrow),
            fused(randfuse.nn.DropoutLinear, narrow),
            narrow,
        ),
        "Linear, ReLU, Dropout 1024→1024": (
            nn.Sequential(wide, nn.ReLU(), nn.Dropout(P)),
            fused(randfuse.nn.LinearDropout, wide, activation="relu"),
            nn.Sequential(wide, nn.ReLU()),
        ),
    }
    times: dict[str, list[list[float]]] = {name: [[], [], []] for name in cases}
    for _ in range(rounds):
        for name, variants in cases.items():
            for samples, layer in zip(times[name], variants, strict=True):
                start = time.perf_counter()
                layer(x).sum().backward()
                samples.append(1e3 * (time.perf_counter() - start))
    return {name: tuple(statistics.median(s[3:]) for s in samples) for name, samples in times.items()}


def decisions() -> tuple[list[tuple[str, str]], int]:
    """For each backend: how many of its decisions differ from the reference's, or why it is not here; and the sum."""
    rows, wrong = [], 0
    key, shape = randfuse.key(2026), (2000, 5000)
    with randfuse.use_backend("reference"):
        expected = randfuse.dropout_mask(shape, P, key=key)
    for backend in ("cpu", "cuda", "triton"):
        reason = _backends.unavailable(backend)
        if reason:
            rows.append((backend, f"not here: {reason}"))
            continue
        device = "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"
        with randfuse.use_backend(backend):
            mask = randfuse.dropout_mask(shape, P, key=key.to(device)).cpu()
        differ = int((mask != expected).sum())
        wrong += differ
        rows.append((backend, f"{differ} of {mask.numel():,} decisions differ"))
    return rows, wrong


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1%} ± {statistics.stdev(values):.1%}"


def picture(curves: dict[str, tuple[list[float], list[float]]], layers: dict[str, tuple[float, ...]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    for axis, (name, (plain, fused)) in zip(axes, curves.items(), strict=False):
        for values, label, style in ((plain, "nn.Dropout + nn.Linear", "-"), (fused, "randfuse", "--")):
            smooth = torch.tensor(values).unfold(0, 10, 1).mean(-1)
            axis.plot(smooth, style, label=label)
        axis.set(title=f"{name}: training loss", xlabel="step", ylabel="cross entropy")
        axis.legend()
    axis = axes[2]
    for offset, (label, index) in enumerate((("PyTorch", 0), ("randfuse", 1), ("no dropout", 2))):
        axis.barh(
            [i + 0.27 * (offset - 1) for i in range(len(layers))],
            [times[index] for times in layers.values()],
            0.25,
            label=label,
        )
    axis.set_yticks(range(len(layers)), [name.replace(", ", ",\n") for name in layers])
    axis.set(title=f"layer, forward + backward, batch {BATCH}", xlabel="ms")
    axis.invert_yaxis()
    axis.legend()
    figure.savefig("demo.png", dpi=110)


def main() -> int:
    testing.guard_onednn()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, p = {P}\n")
    jobs = {"digits": (digit_model, digits(), 150), "text": (text_model, text(), 150)}
    rows: list[tuple[str, str, str, str]] = []
    curves = {}
    for name, (make, data, steps) in jobs.items():
        runs = {fused: [train(make, fused, data, steps, seed) for seed in SEEDS] for fused in (False, True)}
        plain, fused = (runs[f] for f in (False, True))
        seconds = [statistics.median(r["seconds"] for r in runs[f]) for f in (False, True)]
        accuracy = [mean([r["accuracy"] for r in runs[f]]) for f in (False, True)]
        rows.append((f"{name}: test accuracy", *accuracy, ""))
        rows.append((f"{name}: {steps} steps", *(f"{s:.2f} s" for s in seconds), f"{seconds[0] / seconds[1]:.1f}x"))
        curves[name] = (plain[0]["losses"], fused[0]["losses"])
    layers = layer_times()
    for name, (slow, fast, bare) in layers.items():
        rows.append((name, f"{slow:.2f} ms", f"{fast:.2f} ms", f"{slow / fast:.1f}x ({fast / bare:.2f} of no dropout)"))
    print(f"{'':34} {'PyTorch':>16} {'randfuse':>16}   faster")
    for name, slow_text, fast_text, ratio in rows:
        print(f"{name:34} {slow_text:>16} {fast_text:>16}   {ratio}")
    print("\nThe same decisions everywhere, against the plain-PyTorch reference:")
    verdicts, wrong = decisions()
    for backend, verdict in verdicts:
        print(f"  {backend:10} {verdict}")
    picture(curves, layers)
    print("\nwrote demo.png")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
