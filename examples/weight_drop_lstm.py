"""Weight-dropped LSTM language model (Merity, Keskar, Socher, ICLR 2018) on the text of Python's `help()`.

Claim: on little text an LSTM overfits, and dropping its hidden-to-hidden weights, by one mask for a whole sequence,
lowers the validation perplexity; with locked and embedding dropout too (AWD-LSTM) training on costs less still. All
three are one line each, and checkpoints stay those of `nn.LSTM` and `nn.Embedding`.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from pydoc_data import topics

import randfuse
import torch
import torch.nn.functional as F
from randfuse import testing
from torch import Tensor, nn

EMBED, HIDDEN, BATCH, TIME = 128, 256, 20, 35
EPOCHS, SLOW_EPOCHS = 9, 3  # the last few with a quarter of the step size
# weight drop, locked dropout, embedding dropout
VARIANTS = {"no dropout": (0.0, 0.0, 0.0), "weight drop": (0.5, 0.0, 0.0), "weight, locked, embedding": (0.5, 0.2, 0.1)}


def corpus() -> tuple[Tensor, Tensor, int]:
    """Training and validation words as (time, BATCH) columns of running text, and the size of the vocabulary."""
    pages = [re.findall(r"\w+|[^\w\s]", topics.topics[name].lower()) for name in sorted(topics.topics)]
    cut = len(pages) * 9 // 10
    train, valid = ([word for page in part for word in page] for part in (pages[:cut], pages[cut:]))
    words = [w for w, count in Counter(train).items() if count > 1]
    index = {w: i + 1 for i, w in enumerate(words)}  # 0: seen once or never

    def columns(text: list[str]) -> Tensor:
        ids = torch.tensor([index.get(w, 0) for w in text])
        return ids[: len(ids) // BATCH * BATCH].view(BATCH, -1).t().contiguous()

    return columns(train)[:2000], columns(valid), len(words) + 1


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, p_weight: float, p_locked: float, p_embedding: float) -> None:
        super().__init__()
        self.embed = randfuse.nn.EmbeddingDropout(vocabulary, EMBED, p=p_embedding)
        self.locked = randfuse.nn.LockedDropout(p_locked)
        self.rnn = randfuse.nn.WeightDrop(nn.LSTM(EMBED, HIDDEN), p_weight)
        self.head = nn.Linear(HIDDEN, vocabulary)

    def forward(self, words: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.rnn(self.locked(self.embed(words)), state)
        return self.head(self.locked(output)), state


def loss_of(model: LanguageModel, words: Tensor, optimiser: torch.optim.Optimizer | None = None) -> float:
    """Mean cross entropy over the text, in steps of TIME words; a training epoch if there is an optimiser."""
    model.train(optimiser is not None)
    total, state = 0.0, None
    for start in range(0, len(words) - 1, TIME):
        x, y = words[start : start + TIME][: len(words) - 1 - start], words[start + 1 : start + 1 + TIME]
        logits, (h, c) = model(x, state)
        state = h.detach(), c.detach()
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        if optimiser is not None:
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimiser.step()
        total += loss.item() * y.numel()
    return total / ((len(words) - 1) * words.shape[1])


def main() -> None:
    testing.guard_onednn()
    print("claim     weight drop lowers the validation perplexity, at its best and at the end; locked and embedding")
    print("          dropout with it lower the end further")
    train, valid, vocabulary = corpus()
    print(f"{train.numel()} training words, {valid.numel()} validation words, {vocabulary} known; {EPOCHS} epochs\n")
    print(f"{'':28} {'train':>8} {'best valid':>11} {'last valid':>11} {'s/epoch':>8}   perplexity")
    best, last = [], []
    for name, rates in VARIANTS.items():
        torch.manual_seed(0)
        model = LanguageModel(vocabulary, *rates)
        optimiser = torch.optim.Adam(model.parameters(), 4e-3)
        began, valid_losses, train_loss = time.perf_counter(), [], 0.0
        for epoch in range(EPOCHS):
            if epoch == EPOCHS - SLOW_EPOCHS:
                optimiser.param_groups[0]["lr"] /= 4
            train_loss = loss_of(model, train, optimiser)
            with torch.no_grad():
                valid_losses.append(loss_of(model, valid))
        seconds = (time.perf_counter() - began) / EPOCHS
        figures = torch.tensor([train_loss, min(valid_losses), valid_losses[-1]]).exp().tolist()
        print(f"{name:28} {figures[0]:8.1f} {figures[1]:11.1f} {figures[2]:11.1f} {seconds:8.2f}")
        best.append(figures[1])
        last.append(figures[2])
    nn.LSTM(EMBED, HIDDEN).load_state_dict(model.rnn.state_dict())
    print("\nthe last model's recurrent state_dict loads into a plain nn.LSTM")
    holds = best[0] > best[1] and last[0] > last[1] > last[2]
    for when, (none, weights, every) in (("best", best), ("last", last)):
        print(f"measured  {when}: {none:.1f} without dropout, {weights:.1f} with weight drop, {every:.1f} with all")
    print("          as claimed" if holds else "          the claim does not hold here")


if __name__ == "__main__":
    main()
