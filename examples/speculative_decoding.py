"""Speculative decoding (Leviathan et al., 2023; Chen et al., 2023): several tokens for one call of the target.

    python examples/speculative_decoding.py

Trains a small transformer and a much smaller one on the source text that ships with Python, byte by byte. The small
one drafts, one call of the large one scores all drafts, and `speculative_accept` decides from raw logits which stand.
The claim: fewer calls of the target, and a text whose law is the target's to the last digit. Neither model has a
cache of keys and values, with or without drafts.
"""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from randfuse import fold_in, key, split
from randfuse.ops import categorical_sample, speculative_accept
from torch import Tensor, nn

VOCAB, CONTEXT, K = 97, 192, 4


def library() -> Tensor:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    raw = "".join(f.read_text(errors="replace") for f in files)[:1_500_000]
    return torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in raw])  # 0: newline and the rest


class Model(nn.Module):
    """Causal transformer: tokens (B, L) -> logits (B, L, VOCAB)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(n)
        return self.head(self.layers(self.embed(tokens) + self.place.weight[:n], mask=causal, is_causal=True))


def train(model: Model, text: Tensor, steps: int, length: int = 96) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        x = text[torch.randint(len(text) - length, (16, 1)) + torch.arange(length + 1)]
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@torch.inference_mode()
def decode(target: Model, draft: Model, prompt: Tensor, n: int, k: int, mode: str, keys: Tensor):
    """n tokens after each prompt (B, P) with k drafts a call; texts, calls of the target for a text, drafts accepted.

    k = 0 is ordinary sampling. Texts of one batch go on at their own pace: what lies to the right of a causal model's
    row does not matter to it.
    """
    b, p = prompt.shape
    text = F.pad(prompt, (0, n + k + 1))
    done, calls, accepted = torch.full((b,), p), torch.zeros(b), torch.zeros(b)
    while len(at := (done < p + n).nonzero().squeeze(-1)):
        here, rows, logits = done[at], torch.arange(len(at)), []
        for j in range(k):
            logits.append(draft(text[at, : int(here.max()) + j])[rows, here + j - 1])
            # A key for each draft of each step, not for each place: mode "block" has looked beyond its stop.
            text[at, here + j] = categorical_sample(logits[-1], key=fold_in(fold_in(keys[at], here), j))
        places = here.unsqueeze(-1) + torch.arange(k + 1)
        scores = target(text[at, : int(here.max()) + k])[rows.unsqueeze(-1), places - 1]
        drafts = text[at.unsqueeze(-1), places[:, :k]]
        step = speculative_accept(scores, drafts, torch.stack(logits, 1) if k else None, mode=mode, key=keys[at],
                                  positions=here)  # fmt: skip
        text[at.unsqueeze(-1), places] = step.tokens.clamp(min=0)  # the next step writes over the padding
        done[at] += step.num_accepted + 1
        calls[at] += 1
        accepted[at] += step.num_accepted
    return text[:, p : p + n], calls, accepted


@torch.inference_mode()
def chi_square(target: Model, prompt: Tensor, pairs: Tensor) -> tuple[float, int]:
    """Of the first two tokens of texts (N, 2) against the target's exact joint law; cells below 8 are one."""
    first = target(prompt)[0, -1].double().softmax(-1)
    each = torch.cat([prompt.expand(VOCAB, -1), torch.arange(VOCAB).unsqueeze(-1)], -1)
    expected = (first.unsqueeze(-1) * target(each)[:, -1].double().softmax(-1)).flatten() * len(pairs)
    counts = torch.bincount(pairs[:, 0] * VOCAB + pairs[:, 1], minlength=VOCAB**2).double()
    large = expected >= 8
    counts, expected = (torch.cat([c[large], c[~large].sum()[None]]) for c in (counts, expected))
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def main() -> None:
    torch.set_num_threads(1)  # products this small gain little from a second core, and lose much where it is shared
    torch.manual_seed(0)
    text = library()
    target, draft = Model(192, 4), Model(64, 1)
    for name, model, steps in (("target", target, 200), ("draft", draft, 600)):
        start = time.perf_counter()
        loss = train(model, text, steps)
        size = sum(p.numel() for p in model.parameters())
        print(
            f"{name}: {size / 1e6:.2f} M parameters, {loss:.2f} nats a byte after {time.perf_counter() - start:.0f} s"
        )
        model.eval()

    n, seeds = 96, range(8)
    prompt = text[1000:1032].unsqueeze(0)
    print(f"\n{n} bytes at temperature 1, K = {K} drafts a call, batch 1")
    plain = 0.0
    for mode, k in (("token", 0), ("token", K), ("block", K)):
        seconds = calls = accepted = 0.0
        for seed in seeds:
            start = time.perf_counter()
            _, c, a = decode(target, draft, prompt, n, k, mode, split(key(seed), 1))
            seconds += time.perf_counter() - start
            calls += float(c)
            accepted += float(a)
        plain = plain or seconds
        rate = f"{accepted / (k * calls):.0%} of drafts accepted, " if k else ""
        print(f"  {mode if k else 'no drafts':9s}: {rate}{1 + accepted / calls:.2f} tokens a call of the target, "
              f"{len(seeds) * n / seconds:.0f} tokens/s, {plain / seconds:.2f}x")  # fmt: skip

    texts = 4000
    print(f"\nlaw of the first two bytes of {texts} texts, chi-square against the target's own softmax")
    start = prompt[:, :8]
    for name, law_of, mode in (
        ("token", target, "token"),
        ("block", target, "block"),
        ("against the draft", draft, "token"),
    ):
        pairs, *_ = decode(target, draft, start.expand(texts, -1), 2, 2, mode, split(key(9), texts))
        value, freedom = chi_square(law_of, start, pairs)
        sigmas = (value - freedom) / (2 * freedom) ** 0.5
        print(f"  {name:17s}: {value:.0f} with {freedom} degrees of freedom, {sigmas:+.1f} standard deviations")


if __name__ == "__main__":
    main()
