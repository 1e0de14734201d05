"""What tests of kernels share: the house tolerance, exact equality, known answers, and a guard for broken machines."""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SAFE_ISA = "AVX512_CORE_BF16"


def assert_close_to_float64(
    actual: Tensor,
    float64_reference: Tensor,
    pytorch_same_dtype: Tensor,
    *,
    name: str = "result",
    factor: float = 2.0,
    tiny: float = 1e-12,
) -> None:
    """`actual` is off by at most twice (`factor` times) what plain PyTorch is off by in the same dtype.

    The tolerance calibrates itself: max|actual − reference| ≤ factor·max|pytorch − reference| + tiny·max|reference|.
    A place that is not finite in the reference must hold the same inf, or NaN, in `actual`.
    """
    for what, t in (("float64_reference", float64_reference), ("pytorch_same_dtype", pytorch_same_dtype)):
        assert actual.shape == t.shape, f"{name}: shape {tuple(actual.shape)} must be that of {what} {tuple(t.shape)}"
    assert actual.dtype == pytorch_same_dtype.dtype, f"{name}: dtype {actual.dtype} must be {pytorch_same_dtype.dtype}"
    assert float64_reference.dtype == torch.float64, f"{name}: reference must be float64, got {float64_reference.dtype}"
    if actual.numel() == 0:
        return
    finite = float64_reference.isfinite()
    special = torch.where(finite, 0.0, float64_reference)
    assert_bitwise_equal(
        torch.where(finite, 0.0, actual.double()).nan_to_num(nan=1.0), special.nan_to_num(nan=1.0), name=name
    )
    error, allowed = ((t.double() - float64_reference).abs().where(finite, 0.0) for t in (actual, pytorch_same_dtype))
    limit = factor * allowed.max() + tiny * float64_reference.abs().where(finite, 0.0).max()
    if not error.max() <= limit:  # also refuses NaN
        at = _coordinate(error.nan_to_num(nan=float("inf")).argmax(), error.shape)
        raise AssertionError(
            f"{name}: max error {error.max():.3g} exceeds {limit:.3g}, {factor:g} times PyTorch's own "
            f"{allowed.max():.3g} in {actual.dtype}; worst at {at}: got {actual[at]:.9g}, float64 says "
            f"{float64_reference[at]:.9g}, PyTorch {pytorch_same_dtype[at]:.9g}; "
            f"{int((error > limit).sum())} of {error.numel()} places are off"
        )


def assert_bitwise_equal(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Same shape, dtype and bits; the message names the first place that differs and both values."""
    assert actual.shape == expected.shape, f"{name}: shape must be {tuple(expected.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: dtype must be {expected.dtype}, got {actual.dtype}"
    differs = _bits(actual) != _bits(expected)
    if differs.any():
        at = _coordinate(differs.to(torch.uint8).argmax(), differs.shape)
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} places differ, the first at {at}: "
            f"got {actual[at].item()!r}, expected {expected[at].item()!r}"
        )


def _bits(x: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integer[x.element_size()]) if x.is_floating_point() else x


def _coordinate(flat: Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, shape))


class KnownAnswer(NamedTuple):
    """One line of a known-answer file: what it is about, its arguments and the numbers that must come out."""

    kind: str  # a key of _COLUMNS
    arguments: tuple[int, ...]
    answers: tuple[int, ...]


# Columns of each kind: d decimal, x hexadecimal; what follows the bar is the answer, * repeats to the end of the line.
_COLUMNS = {
    "philox": "dxxxxxx|xxxx",
    "domain": "dd|x",
    "fold_in": "xx|x",
    "block": "xdddddd|xxxx",
    "lanes": "xdddddd|x*",
    "digest": "xddddd|x",
    "exponential": "xx|x",
    "race": "xddd|xxx",
}


def known_answers(path: str | Path) -> list[KnownAnswer]:
    """The lines of `tests/kat/streams.txt`, as integers."""
    table = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        kind, *fields = line.split()
        if kind not in _COLUMNS:
            raise ValueError(f"known_answers: line {number} must begin with one of {', '.join(_COLUMNS)}, got {kind!r}")
        arguments, answers = _COLUMNS[kind].split("|")
        if answers.endswith("*"):
            answers = answers[:-1] * (len(fields) - len(arguments))
        if len(fields) != len(arguments) + len(answers):
            raise ValueError(f"known_answers: line {number} must have {len(arguments + answers)} fields: {line!r}")
        values = [int(f, 16 if c == "x" else 10) for f, c in zip(fields, arguments + answers, strict=True)]
        table.append(KnownAnswer(kind, tuple(values[: len(arguments)]), tuple(values[len(arguments) :])))
    return table


def guard_onednn() -> str | None:
    """Keep torch's bf16 products from dying on machines that advertise AMX and fault on it; says what was done.

    Some virtual machines list amx in /proc/cpuinfo but do not let a process use its registers. One product is tried in
    a forked child; if that is killed, ONEDNN_MAX_CPU_ISA is set in this process. oneDNN reads it once, at its first
    use, which in torch may be a float32 product: call this before any.
    """
    if "ONEDNN_MAX_CPU_ISA" in os.environ or not _lists_amx() or _bf16_product_survives():
        return None
    os.environ["ONEDNN_MAX_CPU_ISA"] = SAFE_ISA
    if not _bf16_product_survives():
        raise RuntimeError(
            f"guard_onednn: must run before torch's first matrix product; set ONEDNN_MAX_CPU_ISA={SAFE_ISA} yourself"
        )
    message = f"this machine lists AMX but faults on it: ONEDNN_MAX_CPU_ISA={SAFE_ISA} is set for this process"
    print(f"randfuse: {message}", file=sys.stderr)
    return message


def _lists_amx() -> bool:
    try:
        return "amx" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def _bf16_product_survives() -> bool:
    """A child killed by a signal is the answer no; it makes no threads, whose pool a fork would not have copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking a process with threads
        child = os.fork()
    if child == 0:
        import resource  # not on Windows

        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)
        a = torch.ones(64, 64, dtype=torch.bfloat16)
        torch.mm(a, a)
        os._exit(0)
    return not os.WIFSIGNALED(os.waitpid(child, 0)[1])
