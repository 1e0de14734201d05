"""`report`: one self-contained HTML file with tables and pictures, and the pictures as PNG files."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

from . import BenchError
from .results import Results, Row, ratios
from .table import COLUMNS, cells, seconds

# Okabe and Ito's palette, told apart with any colour vision; a variant has the same colour in every picture.
COLOURS = {
    "eager": "#999999",
    "native": "#F0E442",
    "compile": "#E69F00",
    "randfuse auto": "#0072B2",
    "randfuse cpu": "#0072B2",
    "randfuse cuda": "#56B4E9",
    "randfuse triton": "#009E73",
    "randfuse reference": "#CC79A7",
}
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:84rem;padding:0 1rem;color:#1b1b1b}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap}th{border-bottom:2px solid #444}
td:nth-child(-n+6),th:nth-child(-n+6){text-align:left}
tr.first td{border-top:1px solid #bbb}tr.fused td{background:#eef6fb}td.problem{color:#a00;white-space:normal}
img{max-width:100%}dt{font-weight:600}dd{margin:0 0 .3rem}code{font-size:12px}.wide{overflow-x:auto}
"""


def write(results: Results, directory: Path, stem: str) -> list[Path]:
    """The files written: `<stem>.html` and one `<stem>-<op>.png` for each op that has numbers."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {op: picture(op, groups) for op, groups in _by_op(results).items()}
    written = []
    for op, png in pictures.items():
        written.append(directory / f"{stem}-{op}.png")
        written[-1].write_bytes(png)
    written.append(directory / f"{stem}.html")
    written[-1].write_text(page(results, pictures))
    return written


def _by_op(results: Results) -> dict[str, list[list[Row]]]:
    found: dict[str, list[list[Row]]] = {}
    for (op, *_), rows in results.groups().items():
        if any(ratios(row, rows)["floor"] for row in rows):
            found.setdefault(op, []).append(rows)
    return found


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("bench: report must have matplotlib; `pip install matplotlib`") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def picture(op: str, groups: list[list[Row]]) -> bytes:
    """PNG: for each case a bar a variant, its time as a multiple of the floor's; the nearer to the line the better."""
    plt = _matplotlib()
    bars = [
        [(row, m) for row in rows if row.variant in COLOURS and (m := ratios(row, rows)["floor"])] for rows in groups
    ]
    longest = max(multiple for group in bars for _, multiple in group)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.2 * sum(len(group) + 1 for group in bars)), layout="constrained")
    y, ticks, seen = 0, [], {}
    for group in bars:
        ticks.append((y + (len(group) - 1) / 2, _label(group[0][0])))
        for row, multiple in group:
            seen[row.variant] = axes.barh(y, multiple, 0.9, color=COLOURS[row.variant])
            assert row.summary is not None, "a row with a ratio must have samples"
            axes.text(multiple, y, f" {multiple:.2f}  ({seconds(row.summary.median)})", va="center", fontsize=7.5)
            y += 1
        y += 1
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.7, longest**1.2 * 1.5)
    axes.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=9)
    axes.set_ylim(y - 1, -1)
    axes.set_xlabel("time / floor, log scale; 1 is the same work without randomness, lower is better")
    axes.set_title(f"{op}, {groups[0][0].device}, {groups[0][0].cache} caches", loc="left")
    axes.legend(seen.values(), seen, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=140, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _label(row: Row) -> str:
    shape = "x".join(map(str, row.shape))
    threads = f", {row.threads}t" if row.device == "cpu" else ""
    return f"{shape} {row.dtype}{threads}\n{row.phase}"


def page(results: Results, pictures: dict[str, bytes]) -> str:
    """The HTML; pictures are embedded, nothing is loaded."""
    environment = results.environment
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>randfuse: benchmarks on {escape(environment['machine'])}</title><style>{STYLE}</style>",
        f"<h1>randfuse benchmarks</h1><p>{escape(environment['machine'])}, {escape(environment['date'])}, "
        f"commit {escape(str(environment['commit']))}.</p>",
        "<p>Medians of interleaved samples; every variant passed a correctness check first. "
        "<em>floor</em> is the same work without randomness (a copy, or the plain product). "
        "<em>% of roofline</em> is the least time that this machine's measured bandwidth and matrix rate allow "
        "÷ the time. <em>Peak memory</em> counts tensors allocated during one call, "
        "<em>saved for backward</em> those kept beside the inputs.</p>",
        "<p><strong>Interrupted: only the rows that were finished.</strong></p>" if results.interrupted else "",
    ]
    by_op: dict[str, list[list[Row]]] = {}
    for (op, *_), rows in results.groups().items():
        by_op.setdefault(op, []).append(rows)
    for op, groups in by_op.items():
        parts.append(f"<h2>{escape(op)}</h2>")
        if op in pictures:
            parts.append(f"<img alt='{op}' src='data:image/png;base64,{base64.b64encode(pictures[op]).decode()}'>")
        parts.append(_table(groups))
    parts.append("<h2>Environment</h2><dl>")
    parts += [f"<dt>{escape(k)}</dt><dd><code>{escape(str(v))}</code></dd>" for k, v in environment.items()]
    for name, roof in results.roofline.items():
        parts.append(f"<dt>roofline, {escape(name)}</dt><dd><code>{escape(_rates(roof))}</code></dd>")
    return "\n".join(parts) + "</dl></html>\n"


def _table(groups: list[list[Row]]) -> str:
    lines = ["<div class='wide'><table><tr>", *(f"<th>{name}</th>" for name in COLUMNS), "</tr>"]
    for rows in groups:
        for i, row in enumerate(rows):
            kinds = " ".join(["first"] * (i == 0) + ["fused"] * row.variant.startswith("randfuse"))
            texts = cells(row, rows)
            body = "".join(f"<td>{escape(text)}</td>" for text in texts)
            if row.problem:
                body += f"<td class='problem' colspan='{len(COLUMNS) - len(texts)}'>{escape(row.problem)}</td>"
            lines.append(f"<tr class='{kinds}' title='{escape(row.command, quote=True)}'>{body}</tr>")
    return "\n".join(lines) + "</table></div><p>Hover a row for the command that reproduces it.</p>"


def _rates(roof: dict[str, Any]) -> str:
    parts = []
    for kind in ("read", "copy", "fill"):
        rates = ", ".join(f"{rate / 1e9:.3g} GB/s at {int(n) >> 20} MiB" for n, rate in roof[kind].items())
        parts.append(f"{kind} {rates}")
    parts += [f"matmul {dtype} {rate / 1e9:.4g} GFLOP/s" for dtype, rate in roof["matmul"].items()]
    return "; ".join(parts)
