"""The sampling loop: the model runs only when a position changes, and may be asked for the changing rows alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from .. import _checks
from . import _words
from ._step import Options, check_tokens, mask_of, sequence_keys
from .ancestral import reveal
from .confidence import confidence_step, maskgit_count, transfer_counts
from .first_hitting import first_hit, hitting_steps
from .remask import Variant, dfm_step_size, remask_step
from .schedules import LINEAR, Schedule, level_at
from .uniform import uniform_step

if TYPE_CHECKING:
    from typing_extensions import Unpack

SCORES = {"confidence": "probability", "margin": "margin", "entropy": "entropy", "random": "random"}
REMASKING = {v if v in ("forward-backward", "dfm") else f"remdm-{v}": v for v in get_args(Variant)}
RULES = ("threshold", "factor", "entropy_budget")
OPTIONS: dict[str, tuple[str, ...]] = {  # of each method
    "ancestral": (),
    "first_hitting": ("hits",),
    **dict.fromkeys(REMASKING, ("eta", "t_on", "t_off", "alpha_on")),
    **dict.fromkeys(SCORES, (*RULES, "noise", "noise_on", "tempered", "defer")),
    "maskgit": ("noise",),
    "uniform": ("vocab",),
}


@torch.no_grad()
def generate(
    model: Callable[..., Tensor],
    tokens: Tensor,
    *,
    mask_id: int,
    method: str = "ancestral",
    steps: int | None = None,
    schedule: Schedule = LINEAR,
    block_length: int | None = None,
    window: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = False,
    callback: Callable[[int, Tensor], Tensor | None] | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    **sampling: Unpack[Options],
) -> Tensor:
    """Decode every [MASK] of a batch of texts.

    Prompts are the tokens that are not masked, wherever they stand, of any lengths in a batch; pad with any other id
    and let the model know. The model is called once for a step in which some position changes, and never for another:
    ancestral sampling of L positions in T steps costs at most min(T, L·B) calls, whatever T.

    Args:
        model: tokens (B, L) -> logits (B, L, V). If it has a parameter `rows`, it is given int64 (R,), the changing
            rows of the flattened positions, and returns their logits (R, V): most of a head's work falls away. If it
            has one named `t`, it is given the time, float64 (B,).
        tokens: int64 (B, L), not changed.
        method: "ancestral" (MDLM), "first_hitting" (FHS), "remdm-cap", "remdm-rescale", "remdm-conf", "remdm-loop",
            "forward-backward", "dfm" (`remask_step`), "confidence" (LLaDA, Fast-dLLM), "margin", "entropy" (Dream, EB),
            "random" (`confidence_step`), "maskgit", or "uniform" (`uniform_step`; masked positions begin as uniform
            tokens).
        steps: a number for the whole text, shared out evenly among the blocks; None is one for each position of the
            longest block. First hitting and rules with a threshold or a budget take as many as they need.
        schedule: level of noise over time.
        block_length: decode semi-autoregressively, so many masked positions of each sequence at a time; None is all.
        window: bool (B, L), which masked positions are decoded.
        options: of the method's step: eta, t_on, t_off, alpha_on; threshold, factor, entropy_budget, noise, noise_on,
            tempered, defer; hits for "first_hitting"; vocab for "uniform", which has it. For "maskgit" noise is the
            choice temperature, which falls to 0.
        progress: show a bar; needs tqdm.
        callback: called with the number of the step and the tokens after each that changes something; tokens that it
            returns take their place.
        key, sampling: as in `ancestral_step`; "uniform" takes a temperature alone.

    >>> model = lambda tokens: torch.zeros(*tokens.shape, 10)
    >>> out = generate(model, torch.tensor([[1, 2, 9, 9, 9]]), mask_id=9, steps=1000, key=randfuse.key(0))
    >>> out[0, :2].tolist(), bool((out != 9).all())
    ([1, 2], True)
    """
    op = "generate"
    if method not in OPTIONS:
        raise ValueError(f"{op}: method must be one of {', '.join(OPTIONS)}, got {method!r}")
    if not callable(model):
        raise TypeError(f"{op}: model must be callable, got {type(model).__name__}")
    check_tokens(op, tokens, mask_id)
    options = dict(options or {})
    for what, given, known in (
        ("options", options, OPTIONS[method]),
        ("sampling", sampling, ("temperature",) if method == "uniform" else Options.__annotations__),
    ):
        if not given.keys() <= set(known):
            raise ValueError(f"{op}: {what} of {method!r} must be among [{', '.join(known)}], got {', '.join(given)}")
    if method == "uniform" and "vocab" not in options:
        raise ValueError(f"{op}: options must have vocab for 'uniform', got none")
    for name, value in (("steps", steps), ("block_length", block_length), ("hits", options.get("hits"))):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{op}: {name} must be a positive int or None, got {value!r}")
    mask_of(op, "window", window, tokens)
    masked = tokens == mask_id if window is None else (tokens == mask_id) & window
    blocks = _blocks(masked, block_length)
    loop = Loop(model, mask_id, schedule, sequence_keys(op, key, generator, tokens), sampling, options)
    with _Progress(int(masked.sum()), progress) as bar:
        for k, block in enumerate(blocks):
            length = int(block.sum(1).max())
            n = length if steps is None else max(steps * (k + 1) // len(blocks) - steps * k // len(blocks), 1)
            for changed in loop.block(method, tokens, block, n):
                answer = callback(loop.step - 1, changed) if callback is not None else None
                if answer is not None:
                    check_tokens(f"{op}: callback", answer, mask_id)
                    _checks.shape(f"{op}: callback", "tokens", answer, tuple(tokens.shape), "(B, L)")
                tokens = loop.tokens = changed if answer is None else answer
                bar.show(int((tokens[masked] != mask_id).sum()))
    return tokens.clone() if not blocks else tokens


class Loop:
    """What the methods share: the model as a function of rows, asked when a step needs it, and the step number."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        mask_id: int,
        schedule: Schedule,
        keys: Tensor,
        sampling: Mapping[str, Any],
        options: dict[str, Any],
    ) -> None:
        parameters = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model).parameters
        self.takes_rows, self.takes_t = "rows" in parameters, "t" in parameters
        self.model, self.mask_id, self.schedule, self.options = model, mask_id, schedule, options
        self.common: dict[str, Any] = {"mask_id": mask_id, "key": keys, **sampling}
        self.keys, self.sampling, self.step = keys, sampling, 0
        self.tokens: Tensor

    def block(self, method: str, tokens: Tensor, window: Tensor, steps: int) -> Iterator[Tensor]:
        """The tokens after each step that changed something; `self.tokens` is what the next one begins with."""
        self.tokens, self.window = tokens, window
        self.common["window"] = window
        first = self.step
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        if method == "ancestral":
            run = self._ancestral(times)
        elif method == "first_hitting":
            run = self._first_hitting()
        elif method in REMASKING:
            run = self._remask(REMASKING[method], times)
        elif method == "uniform":
            run = self._uniform(times)
        else:
            run = self._ranked(method, steps)
        for new in run:
            self.step += 1
            if not torch.equal(new, self.tokens):
                yield new
        self.step = max(self.step, first + steps)

    def logits(self, t: float | Tensor) -> Callable[[Tensor], Tensor]:
        def ask(rows: Tensor) -> Tensor:
            more: dict[str, Tensor] = {"rows": rows} if self.takes_rows else {}
            if self.takes_t:
                time = torch.as_tensor(t, dtype=torch.float64, device=self.tokens.device)
                more["t"] = time.expand(self.tokens.shape[0])
            out = self.model(self.tokens, **more)
            leading = (len(rows),) if self.takes_rows else tuple(self.tokens.shape)
            if not isinstance(out, Tensor) or tuple(out.shape[:-1]) != leading:
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(f"generate: model must give logits {(*leading, 'V')}, got {got}")
            return out if self.takes_rows else out.flatten(0, 1)[rows]

        return ask

    def _reveal(self, where: Tensor, t: float | Tensor) -> Tensor:
        options = {**self.sampling, "mask_id": self.mask_id, "key": self.keys, "step": self.step}
        return reveal(self.logits(t), self.tokens, where, **options)  # type: ignore[arg-type]

    def _ancestral(self, times: list[float]) -> Iterator[Tensor]:
        """Binned first hitting: all steps are known beforehand, those without an event are skipped."""
        when = hitting_steps(
            self.tokens, torch.tensor(times), mask_id=self.mask_id, schedule=self.schedule, window=self.window,
            key=self.keys,
        )  # fmt: skip
        first = self.step
        for k in when[when >= 0].unique().tolist():
            self.step = first + k
            yield self._reveal(when == k, times[k])

    def _first_hitting(self) -> Iterator[Tensor]:
        clock = level_at("generate", torch.ones_like(self.keys, dtype=torch.float64), self.schedule).log()
        hits = self.options.get("hits") or 1
        for _ in range(-(-int(self.window.sum(1).max()) // hits)):
            hit = first_hit(
                self.tokens, clock, hits=hits, mask_id=self.mask_id, step=self.step, window=self.window, key=self.keys
            )
            clock = hit.clock
            yield self._reveal(hit.where, self.schedule.time(clock.exp()))
            self.step += hits - 1  # the events that this step was made of

    def _remask(self, variant: Variant, times: list[float]) -> Iterator[Tensor]:
        t, confidence, steps = 1.0, None, len(times) - 1
        for k in range(2**31):
            s = times[k + 1] if variant != "dfm" else max(t - dfm_step_size(t, steps), 0.0) if t > 1 / steps else 0.0
            new, confidence = remask_step(
                self.logits(t), self.tokens, t, s, variant=variant, confidence=confidence, schedule=self.schedule,
                step=self.step, **self.common, **self.options,
            )  # fmt: skip
            yield new
            t = s
            if t == 0:
                return

    def _uniform(self, times: list[float]) -> Iterator[Tensor]:
        vocab = self.options["vocab"]
        word = _words.words(self.keys, _words.CLOCK, torch.full_like(self.keys[:1], 3), self.tokens.shape[1])
        start = _words.index_below(word, torch.full_like(word, vocab))
        yield start.where(self.window & (self.tokens == self.mask_id), self.tokens)
        options: dict[str, Any] = {k: v for k, v in self.sampling.items() if k == "temperature"}
        for t, s in pairwise(times):
            yield uniform_step(
                self.logits(t), self.tokens, t, s, schedule=self.schedule, step=self.step, window=self.window,
                key=self.keys, vocab=vocab, **options,
            )  # fmt: skip

    def _ranked(self, method: str, steps: int) -> Iterator[Tensor]:
        options = dict(self.options)
        left = initial = ((self.tokens == self.mask_id) & self.window).sum(1)
        as_needed = any(options.get(rule) is not None for rule in RULES)
        noise = options.pop("noise", 0.0)
        shares = transfer_counts(initial, steps)
        for k in range(int(initial.max()) if as_needed else min(steps, int(initial.max()))):
            if as_needed and not bool(left.any()):
                return
            if method == "maskgit":
                options |= {"by": "probability", "noise_on": "logprob", "tempered": True}
                options |= {"noise": noise * (1 - (k + 1) / steps), "count": maskgit_count(left, initial, k, steps)}
            else:
                options |= {"by": SCORES[method], "noise": noise} | ({} if as_needed else {"count": shares[:, k]})
            t = left.double() / initial.clamp(min=1)
            yield confidence_step(self.logits(t), self.tokens, step=self.step, **self.common, **options)
            left = ((self.tokens == self.mask_id) & self.window).sum(1)


def _blocks(masked: Tensor, block_length: int | None) -> list[Tensor]:
    """Windows of so many masked positions of each sequence, from left to right."""
    place = masked.cumsum(1) - 1
    count = int(place.max()) + 1 if masked.any() else 0
    size = block_length or max(count, 1)
    return [masked & (place // size == k) for k in range(-(-count // size))]


class _Progress:
    """A bar of decoded positions."""

    def __init__(self, total: int, wanted: bool) -> None:
        self.bar: Any = None
        if wanted:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError("generate: progress needs tqdm; `pip install tqdm`") from error
            self.bar = tqdm(total=total, unit="token", dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def show(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self.bar.n)

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()
