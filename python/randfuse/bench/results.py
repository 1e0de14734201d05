"""The result file: JSON of a stated schema, one object a row, raw samples kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import BenchError
from .case import Shape
from .timing import Summary, summarise

SCHEMA = 1


@dataclass
class Row:
    """One variant of one case. Without samples it has a `problem`, which says why."""

    op: str
    shape: Shape
    dtype: str
    phase: str  # "forward" or "forward+backward"
    device: str
    threads: int
    cache: str  # "cold" or "hot"
    variant: str
    command: str  # reproduces the row
    samples: list[float] = field(default_factory=list)  # seconds
    method: str = ""
    least: float | None = None  # seconds by the roofline
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    problem: str | None = None
    wrong: bool = False  # the problem is a result that cannot be trusted, not an absent backend

    @property
    def group(self) -> tuple:
        """Rows of one group are variants of the same work."""
        return self.op, tuple(self.shape), self.dtype, self.phase, self.device, self.threads, self.cache

    @property
    def summary(self) -> Summary | None:
        return summarise(self.samples) if self.samples and not self.problem else None


@dataclass
class Results:
    environment: dict[str, Any]
    roofline: dict[str, Any] = field(default_factory=dict)  # "cpu, 2 threads, cold" -> Roofline
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False  # rows are missing

    def groups(self) -> dict[tuple, list[Row]]:
        found: dict[tuple, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    def status(self) -> int:
        """Exit status of a run: 130 when interrupted, 1 when a variant computed something wrong or impossible."""
        return 130 if self.interrupted else int(any(row.wrong for row in self.rows))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": SCHEMA, **asdict(self)}
        for row, data in zip(self.rows, document["rows"], strict=True):
            summary = row.summary
            data["summary"] = summary._asdict() if summary else None  # for readers; load() recomputes it
        path.write_text(json.dumps(document, indent=1) + "\n")


def load(path: Path) -> Results:
    """Raises BenchError when the file is not a result file of this schema."""
    document = json.loads(path.read_text())
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise BenchError(f"bench: {path} must be a result file of schema {SCHEMA}, got schema {schema}")
    rows = [Row(**{k: v for k, v in row.items() if k != "summary"}) for row in document["rows"]]
    return Results(document["environment"], document["roofline"], rows, document["interrupted"])


def ratios(row: Row, peers: list[Row]) -> dict[str, float | None]:
    """Of medians: eager's time ÷ the row's (how much faster), the row's ÷ the floor's, the roofline's ÷ the row's."""
    named = {peer.variant: peer.summary for peer in peers}
    mine, eager, floor = row.summary, named.get("eager"), named.get("floor")
    return {
        "eager": eager.median / mine.median if mine and eager else None,
        "floor": mine.median / floor.median if mine and floor else None,
        "roofline": row.least / mine.median if mine and row.least else None,
    }
