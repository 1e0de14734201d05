"""Rows as text, for the terminal and the HTML report."""

from __future__ import annotations

from .results import Results, Row, ratios

COLUMNS = (
    "op",
    "shape",
    "dtype",
    "pass",
    "threads",
    "variant",
    "median",
    "p20 - p80",
    "faster than eager",
    "time / floor",
    "% of roofline",
    "peak memory",
    "saved for backward",
    "launches",
)


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def size(value: int | None) -> str:
    if value is None:
        return ""
    scaled = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(scaled) < 1024 or unit == "GiB":
            break
        scaled /= 1024
    return f"{scaled:.3g} {unit}"


def cells(row: Row, peers: list[Row]) -> list[str]:
    """One cell a column; a row with a problem has none after the variant's name."""
    head = [row.op, "x".join(map(str, row.shape)), row.dtype, row.phase, str(row.threads), row.variant]
    summary = row.summary
    if summary is None:
        return head
    relative = ratios(row, peers)
    return [
        *head,
        seconds(summary.median),
        f"{seconds(summary.p20)} - {seconds(summary.p80)}",
        *("" if relative[name] is None else f"{relative[name]:.2f}x" for name in ("eager", "floor")),
        "" if relative["roofline"] is None else f"{100 * relative['roofline']:.0f}",
        size(row.peak_bytes),
        size(row.saved_bytes),
        "" if row.launches is None else str(row.launches),
    ]


def render(results: Results) -> str:
    """The table, a blank line between groups; below it each problem once."""
    shown = ([row for row in peers if row.summary or row.wrong] for peers in results.groups().values())
    groups = [[cells(row, peers) for row in peers] for peers in shown]
    lines = [list(COLUMNS), *(line for group in groups for line in group)]
    used = [i for i in range(len(COLUMNS)) if any(len(line) > i and line[i] for line in lines[1:])]
    widths = [max((len(line[i]) for line in lines if len(line) > i), default=0) for i in range(len(COLUMNS))]

    def text(line: list[str]) -> str:
        return "  ".join((line[i] if len(line) > i else "-").ljust(widths[i]) for i in used).rstrip()

    body = "\n\n".join("\n".join(text(line) for line in group) for group in groups)
    return "\n".join([text(list(COLUMNS)), body, *_problems(results)])


def _problems(results: Results) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in results.rows:
        if row.problem:
            where = f"{row.op} {'x'.join(map(str, row.shape))} {row.dtype} {row.phase}"
            found.setdefault(f"{row.variant}: {row.problem}", []).append(where)
    lines = [
        f"no number for {what} ({', '.join(where[:2])}{f' and {len(where) - 2} more' if len(where) > 2 else ''})"
        for what, where in found.items()
    ]
    return ["", *lines] if lines else []
