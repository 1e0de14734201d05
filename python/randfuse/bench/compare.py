"""`compare`: a verdict for each row of two result files, by the bootstrap.

The ratio of the medians, new ÷ old, is resampled. FAST and SLOW need an interval that excludes 1 and a change beyond
the band of 3 % that identical code shows on a quiet machine; SAME needs an interval inside the band; what the samples
cannot decide is AMBIGUOUS.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import BenchError
from .results import Results, Row

BAND = 0.03
CONFIDENCE = 0.99
RESAMPLES = 4000


class Verdict(NamedTuple):
    row: Row  # the new one; the old one where the new file has none
    verdict: str  # FAST, SLOW, SAME, AMBIGUOUS, or MISSING where a file has no number
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


def judge(old: list[float], new: list[float], seed: int = 0) -> tuple[str, float, float, float]:
    """Verdict, ratio of the medians and its confidence interval."""
    rng = np.random.default_rng(seed)

    def medians(samples: list[float]) -> np.ndarray:
        picks = rng.integers(len(samples), size=(RESAMPLES, len(samples)))
        return np.median(np.asarray(samples)[picks], axis=1)

    ratio = float(np.median(new) / np.median(old))
    low, high = np.quantile(medians(new) / medians(old), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if high < 1 and ratio < 1 - BAND:
        verdict = "FAST"
    elif low > 1 and ratio > 1 + BAND:
        verdict = "SLOW"
    elif low >= 1 - BAND and high <= 1 + BAND:
        verdict = "SAME"
    else:
        verdict = "AMBIGUOUS"
    return verdict, ratio, float(low), float(high)


def compare(old: Results, new: Results, *, force: bool = False) -> list[Verdict]:
    """One verdict for each row of either file. Different machines are refused unless forced."""
    machines = [r.environment["machine"] for r in (old, new)]
    if machines[0] != machines[1] and not force:
        raise BenchError(
            f"bench: results must come from one machine, got {machines[0]!r} and {machines[1]!r}; "
            "--force compares them all the same"
        )
    before, after = ({(*row.group, row.variant): row for row in r.rows} for r in (old, new))
    verdicts = []
    for identity in [*after, *(i for i in before if i not in after)]:
        a, b = before.get(identity), after.get(identity)
        if a is not None and b is not None and a.summary and b.summary:
            verdicts.append(Verdict(b, *judge(a.samples, b.samples)))
        elif row := b or a:
            verdicts.append(Verdict(row, "MISSING"))
    return verdicts


def worst(verdicts: list[Verdict]) -> float:
    """Largest ratio among the SLOW rows; 1 if there is none."""
    return max((v.ratio for v in verdicts if v.verdict == "SLOW" and v.ratio is not None), default=1.0)


def render(verdicts: list[Verdict]) -> str:
    lines = []
    for v in verdicts:
        shape = "x".join(map(str, v.row.shape))
        where = f"{v.row.op} {shape} {v.row.dtype} {v.row.phase} {v.row.threads}t {v.row.cache} {v.row.variant}"
        change = "" if v.ratio is None else f"  {v.ratio:.3f} of the old time, 99 % in [{v.low:.3f}, {v.high:.3f}]"
        lines.append(f"{v.verdict:<9}  {where}{change}")
    counts = {name: sum(v.verdict == name for v in verdicts) for name in sorted({v.verdict for v in verdicts})}
    return "\n".join([*lines, ", ".join(f"{n} {name}" for name, n in counts.items())])
