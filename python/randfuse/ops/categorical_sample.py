"""`categorical_sample`, its statistics and its races over shards: exact draws from softmax(logits / temperature)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _sampling, keys
from .._backends import call
from .._registry import rules
from .dropout import batch_keys

WORDS = 2**34  # 32-bit lanes of a row


class CategoricalStats(NamedTuple):
    """Tokens and facts of the law they were drawn from, from the same read; see `categorical_sample_with_stats`."""

    tokens: Tensor
    logprob: Tensor
    log_odds: Tensor
    margin: Tensor
    entropy: Tensor
    logsumexp: Tensor


class RaceWinner(NamedTuple):
    """The winner of a shard's race and by how much it won; see `categorical_race`."""

    tokens: Tensor
    score: Tensor


def categorical_sample(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    num_samples: int | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    exclude: Tensor | None = None,
    bitmask: Tensor | None = None,
    uncond_logits: Tensor | None = None,
    cfg_scale: float = 0.0,
    rows: Tensor | None = None,
    method: Literal["cdf", "race"] = "cdf",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    """Draw tokens from softmax(logits / temperature), exactly, reading the raw logits once.

    Equivalent to: ``torch.multinomial(torch.softmax(logits.double() / temperature, -1), 1)`` in law, without its
    copies, its float32 tail or its limit of 2**24 categories.

    Both methods draw from the float64 law: no token is too unlikely, unlike argmax(logits + Gumbel) in float32, which
    drops what is 2**-24 as likely as the rest and so lowers the temperature. "cdf" sums tiles of 1024 tokens, then
    inverts the distribution: a tile by 53 of 64 bits, a token in it by 53 others; further draws cost a tile each.
    "race" gives every token an exponential of its own and takes the first: the draw moves little when logits do
    (coupled drafts), and costs a Philox word a token and draw. Where float32 cannot decide, float64 does, so every
    backend, thread count and instruction set gives the same tokens. Order: guidance, exclude and bitmask, temperature,
    top_k, top_p, min_p; later filters see what earlier ones left.

    Args:
        logits: (…, V), V up to 2**20, float32, float16, bfloat16 or (on the CPU) float64. Rows may have any strides;
            a last dimension that is not contiguous is copied. No gradient flows: a token has none.
        temperature: a number or a tensor () or (…), 0 or in [2**-100, 2**100]. 0 takes the largest logit, of equal ones
            that of lowest index.
        num_samples: M independent draws a row; the result is then (…, M).
        top_k: keep exactly the k ≥ 1 largest, ties by lowest index; a number or an int64 tensor () or (…).
        top_p: in [0, 1]; keep the largest until their probability reaches top_p, the token that crosses included.
        min_p: in [0, 1]; keep what is at least min_p times as likely as the most likely token.
        exclude: int64 (E,), ids that no row may draw (the mask token, padding ids).
        bitmask: int32 (rows, ⌈V/32⌉), bit v mod 32 of word v div 32 set where token v is allowed; rows is all of (…).
        uncond_logits: like logits; logits become uncond + (cfg_scale + 1)(logits − uncond), in float32.
        rows: int64 (R,), which rows of the flattened logits to draw for; the result is (R,) or (R, M) and equals those
            rows of the whole result. Per-row arguments and keys stay those of all rows.
        method: "cdf" or "race".
        key: int64 () or (G,); G must divide the rows, and run r of rows/G rows reads key r. None draws one.
        row_offset: place of the first row in a larger matrix.

    A NaN counts as −inf and is never drawn. The first +inf of a row wins it. A row without any other logit than −inf
    gives 0; `categorical_sample_with_stats` shows all three in logsumexp.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape, value or id, named in the message. Values of tensors are
            checked where they can be read, on the CPU. On a GPU temperatures, filters and ids are brought into their
            ranges (NaN filters nothing and is temperature 0); a row that does not exist gives token −1 and NaN.

    Zheng et al., "Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical
    Sampling", 2024 (arXiv 2409.02908), on what inexact sampling does.

    >>> logits = torch.tensor([[0.0, 5.0, 1.0], [3.0, 3.0, -1.0]])
    >>> categorical_sample(logits, 0.0)
    tensor([1, 0])
    >>> k = randfuse.key(0)
    >>> bool((categorical_sample(logits, top_k=1, num_samples=4, key=k) == torch.tensor([[1], [0]])).all())
    True
    """
    args = arguments(
        "categorical_sample", logits, temperature, num_samples, top_k, top_p, min_p, exclude, bitmask, uncond_logits,
        cfg_scale, rows, method, key, generator, row_offset,
    )  # fmt: skip
    return call("categorical_sample", *args)


def categorical_sample_with_stats(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    num_samples: int | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    exclude: Tensor | None = None,
    bitmask: Tensor | None = None,
    uncond_logits: Tensor | None = None,
    cfg_scale: float = 0.0,
    rows: Tensor | None = None,
    method: Literal["cdf", "race"] = "cdf",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> CategoricalStats:
    """The tokens of `categorical_sample` and what decoding rules rank positions by, from the same read.

    Equivalent to: ``torch.log_softmax(logits / temperature, -1).gather(-1, tokens)`` for logprob, and so on.

    All facts are those of the law that was drawn from: guided, masked, tempered and filtered; at temperature 0 they
    are those of temperature 1. They are float32 (float64 for float64 logits) and do not saturate as probabilities do.

    * tokens, logprob (…) or (…, M): log p of the token.
    * log_odds: log p − log(1 − p), so p = sigmoid(log_odds); orders tokens of p = 1 − 1e-12 and 1 − 1e-11.
    * margin (…): p₁ − p₂ = tanh(margin / 2) for the two likeliest tokens.
    * entropy (…): in nats.
    * logsumexp (…): of the filtered logits / temperature; NaN if a logit was NaN, inf if one was +inf, −inf if no
      token was left. In the last case token is 0 and the other facts are NaN; with +inf they are those of certainty.

    They carry no gradient; that of logprob is the gradient of the expression above.

    Args:
        logits, temperature, num_samples, …: as in `categorical_sample`.

    Raises:
        TypeError, ValueError: as in `categorical_sample`.

    >>> facts = categorical_sample_with_stats(torch.zeros(2, 4), key=randfuse.key(0))
    >>> facts.entropy
    tensor([1.3863, 1.3863])
    """
    args = arguments(
        "categorical_sample_with_stats", logits, temperature, num_samples, top_k, top_p, min_p, exclude, bitmask,
        uncond_logits, cfg_scale, rows, method, key, generator, row_offset,
    )  # fmt: skip
    return CategoricalStats(*call("categorical_sample_with_stats", *args))


def categorical_race(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    num_samples: int | None = None,
    exclude: Tensor | None = None,
    bitmask: Tensor | None = None,
    uncond_logits: Tensor | None = None,
    cfg_scale: float = 0.0,
    rows: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> RaceWinner:
    """`categorical_sample(method="race")` of a shard of the vocabulary, with the score by which shards are merged.

    Equivalent to: ``(logits / temperature - log E).max(-1)``, E the exponentials of the tokens in the vocabulary.

    The largest score wins, of equal ones that of the lowest shard: tensor-parallel ranks exchange 16 bytes a row, and
    chunks of a vocabulary are drawn from one after the other, with the very token that the whole row gives.

    Args:
        logits: (…, V), the shard's columns.
        temperature, num_samples, uncond_logits, cfg_scale, rows, key, row_offset: as in `categorical_sample`, and the
            same for all shards (key=None gives each shard another one). At temperature 0 the score is the logit.
        exclude: int64 (E,), ids of the whole vocabulary; those of other shards change nothing.
        bitmask: int32 (rows, ⌈V/32⌉), of the shard's columns.
        col_offset: id of the shard's first token, a multiple of 4 (a Philox block holds four) in [0, 2**34 − V].

    tokens (…) or (…, M) are ids of the whole vocabulary; score is float64, −inf where no token is allowed. Which tokens
    top_k, top_p and min_p keep is not known from a shard: filter its logits first.

    Raises:
        TypeError, ValueError: as in `categorical_sample`.

    >>> x, k = torch.randn(3, 1000), randfuse.key(0)
    >>> a, b = categorical_race(x[:, :600], key=k), categorical_race(x[:, 600:], key=k, col_offset=600)
    >>> torch.equal(torch.where(b.score > a.score, b.tokens, a.tokens), categorical_sample(x, method="race", key=k))
    True
    """
    op = "categorical_race"
    args = arguments(
        op, logits, temperature, num_samples, None, None, None, exclude, bitmask, uncond_logits, cfg_scale, rows,
        "race", key, generator, row_offset, col_offset,
    )  # fmt: skip
    return RaceWinner(*call(op, *args[:3], *args[6:12], row_offset, col_offset))


def arguments(
    op: str,
    logits: Tensor,
    temperature: Any,
    num_samples: int | None,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    exclude: Tensor | None,
    bitmask: Tensor | None,
    uncond_logits: Tensor | None,
    cfg_scale: float,
    rows: Tensor | None,
    method: str,
    key: Tensor | None,
    generator: torch.Generator | None,
    row_offset: int,
    col_offset: int | None = None,
) -> tuple[Any, ...]:
    """Checked arguments in the order of the schema."""
    _checks.float_tensor(op, "logits", logits)
    if logits.dim() == 0 or not 1 <= logits.shape[-1] <= _sampling.MAX_VOCAB:
        raise ValueError(f"{op}: logits must have shape (…, V) with V in [1, 2**20], got {tuple(logits.shape)}")
    n, vocab = _checks.rows_cols(logits.shape)
    _checks.stream_range(op, n, vocab, row_offset, col_offset or 0)
    if col_offset is not None and not (col_offset % 4 == 0 and col_offset <= WORDS - vocab):
        raise ValueError(f"{op}: col_offset must be a multiple of 4 in [0, 2**34 - V], got {col_offset}")
    keys.check(op, key, generator, n, logits.device)
    if method not in ("cdf", "race"):
        raise ValueError(f"{op}: method must be 'cdf' or 'race', got {method!r}")
    if num_samples is not None and (isinstance(num_samples, bool) or not isinstance(num_samples, int)):
        raise TypeError(f"{op}: num_samples must be an int or None, got {type(num_samples).__name__}")
    if num_samples is not None and not 1 <= num_samples < 2**32:
        raise ValueError(f"{op}: num_samples must be in [1, 2**32), got {num_samples}")
    if isinstance(cfg_scale, bool) or not isinstance(cfg_scale, (int, float)) or not math.isfinite(cfg_scale):
        raise ValueError(f"{op}: cfg_scale must be a finite number, got {cfg_scale!r}")
    if uncond_logits is not None:
        _checks.float_tensor(op, "uncond_logits", uncond_logits, like=logits)
        _checks.shape(op, "uncond_logits", uncond_logits, tuple(logits.shape), "(…, V)")
        uncond_logits = uncond_logits.detach()
    _ids(op, "exclude", exclude, vocab if col_offset is None else WORDS, logits.device)
    _ids(op, "rows", rows, n, logits.device)
    if bitmask is not None:
        _sampling.integers(op, "bitmask", bitmask, torch.int32, logits.device)
        _checks.shape(op, "bitmask", bitmask, (n, (vocab + 31) // 32), "(rows, ⌈V/32⌉)")
    rows_shape = tuple(logits.shape[:-1])
    parameters = _sampling.parameters(op, rows_shape, logits.device, temperature, top_k, top_p, min_p)
    key = keys.resolve(key, generator, logits.device)
    return (logits.detach(), key, *parameters, exclude, bitmask, uncond_logits, float(cfg_scale), rows, num_samples,
            method, row_offset)  # fmt: skip


def _ids(op: str, name: str, ids: object, limit: int, device: torch.device) -> None:
    """int64 (E,) of ids in [0, limit), where they can be read."""
    if ids is None:
        return
    _sampling.integers(op, name, ids, torch.int64, device)
    assert isinstance(ids, Tensor)
    if ids.dim() != 1:
        raise ValueError(f"{op}: {name} must have one dimension, got {tuple(ids.shape)}")
    if (
        device.type == "cpu"
        and _sampling.readable(ids)
        and ids.numel()
        and not bool(((ids >= 0) & (ids < limit)).all())
    ):
        bad = ids[(ids < 0) | (ids >= limit)][0].item()
        raise ValueError(f"{op}: {name} must be in [0, {limit}), got {bad}")


def _shapes(logits: Tensor, rows: Tensor | None, num_samples: int | None) -> tuple[tuple, tuple]:
    per_row = tuple(logits.shape[:-1]) if rows is None else tuple(rows.shape)
    return per_row, per_row if num_samples is None else (*per_row, num_samples)


def _fake(logits: Tensor, *args: Any) -> Tensor:
    rows, num_samples = args[9:11]
    return logits.new_empty(_shapes(logits, rows, num_samples)[1], dtype=torch.int64)


def _stats_fake(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    rows, num_samples = args[9:11]
    per_row, per_draw = _shapes(logits, rows, num_samples)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    facts = (logits.new_empty(s, dtype=dtype) for s in (per_draw, per_draw, per_row, per_row, per_row))
    return logits.new_empty(per_draw, dtype=torch.int64), *facts


def _race_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    per_draw = _shapes(logits, *args[6:8])[1]
    return logits.new_empty(per_draw, dtype=torch.int64), logits.new_empty(per_draw, dtype=torch.float64)


ROWWISE = ("logits", "uncond_logits", "temperature", "top_k", "top_p", "min_p", "bitmask")
ARGUMENTS = {
    "categorical_sample": "logits key temperature top_k top_p min_p exclude bitmask uncond_logits cfg_scale rows "
    "num_samples method row_offset",
    "categorical_race": "logits key temperature exclude bitmask uncond_logits cfg_scale rows num_samples row_offset "
    "col_offset",
}
ARGUMENTS["categorical_sample_with_stats"] = ARGUMENTS["categorical_sample"]


def _vmap(op: str, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """The rows of all batch elements as one matrix; a key that they share gives them the same draws, as in dropout."""
    size, names = info.batch_size, ARGUMENTS[op].split()
    a, dims = dict(zip(names, args, strict=True)), dict(zip(names, in_dims, strict=True))
    if dims["exclude"] is not None:
        raise ValueError(f"{op}: exclude must be the same for the whole batch under vmap, got a batched tensor")
    shape = a["logits"].shape if dims["logits"] is None else a["logits"].movedim(dims["logits"], 0).shape[1:]
    n = math.prod(shape[:-1])
    for name in ROWWISE:
        x, dim = a.get(name), dims.get(name)
        if x is None or (dim is None and x.dim() == 0):
            continue
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        if name in ("logits", "uncond_logits"):
            a[name] = x.reshape(size * n, shape[-1])
        elif name == "bitmask":
            a[name] = x.reshape(size * n, x.shape[-1])
        else:
            a[name] = x.reshape(size, -1).expand(size, n).reshape(-1)
    a["key"] = batch_keys(a["key"], dims["key"], size)
    per_row = tuple(shape[:-1])
    if a["rows"] is not None:
        chosen = a["rows"] if dims["rows"] is None else a["rows"].movedim(dims["rows"], 0)
        first = n * torch.arange(size, device=chosen.device).unsqueeze(-1)
        per_row, a["rows"] = tuple(chosen.shape[-1:]), (first + chosen).reshape(-1)
    out = call(op, *a.values())
    of = [y.reshape(size, *per_row, *y.shape[1:]) for y in ([out] if isinstance(out, Tensor) else out)]
    return (of[0], 0) if isinstance(out, Tensor) else (tuple(of), (0,) * len(of))


for _op, _shape in (
    ("categorical_sample", _fake),
    ("categorical_sample_with_stats", _stats_fake),
    ("categorical_race", _race_fake),
):
    rules(_op, _shape, vmap=partial(_vmap, _op))
