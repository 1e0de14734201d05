"""Command line of the benchmarks; `python -m randfuse.bench --help`."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..testing import guard_onednn
from . import BenchError, case, compare, env, report, results, run, table
from .variants import BACKENDS, PLAIN, PUBLIC, backend_problem, public_problem

# Large outputs come from fresh pages on every call, and the faults cost more than the kernel, unless glibc keeps its
# memory. All variants run under the same setting.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m randfuse.bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def words(text: str) -> list[str]:
        return text.split(",")

    def sizes(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.replace("x", ",").split(","))

    def percent(text: str) -> float:
        return float(text.rstrip("%")) / 100

    for name, summary in (("list", "cases and backends, with the reason of those that cannot run"), ("run", "measure")):
        p = commands.add_parser(name, help=summary, description=summary)
        p.add_argument("--device", choices=tuple(BACKENDS), default="cuda" if torch.cuda.is_available() else "cpu")
        p.add_argument("--preset", choices=case.PRESETS, default="default")
        p.add_argument("--op", type=words, metavar="OP,…", help="only these ops")
        p.add_argument("--case", default="", metavar="PART", help="only cases whose name (see list) contains this")
        p.add_argument("--shape", type=sizes, action="append", metavar="N,…", help="this shape instead (with one --op)")
        p.add_argument("--dtype", type=words, metavar="DTYPE,…", help=", ".join(case.DTYPES))
        p.add_argument("--pass", dest="phase", type=words, metavar="PASS,…", help=", ".join(case.PASSES))
    p.add_argument("--backend", type=words, metavar="NAME,…", help=f"{', '.join((*PLAIN, *PUBLIC))} and randfuse's own")
    p.add_argument("--threads", type=lambda t: [int(n) for n in t.split(",")], metavar="N,…", help="CPU threads")
    p.add_argument("--rounds", type=int, help="samples of each variant")
    cache = p.add_mutually_exclusive_group()
    cache.add_argument("--cold", dest="cold", action="store_true", default=True, help="evict caches first (default)")
    cache.add_argument("--hot", dest="cold", action="store_false", help="leave caches as the last call left them")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="default: bench-out/<date>.json")
    p.add_argument("--default-malloc", action="store_true", help="leave malloc alone: large outputs fault")

    p = commands.add_parser("compare", help="FAST, SLOW, SAME or AMBIGUOUS for each row of two results")
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    p.add_argument("--force", action="store_true", help="compare results of different machines")
    p.add_argument("--fail-above", type=percent, metavar="PERCENT", help="exit with 1 if a SLOW row lost more")

    p = commands.add_parser("report", help="HTML with tables and pictures, and the pictures as PNG")
    p.add_argument("results", type=Path)
    p.add_argument("--out", type=Path, metavar="DIRECTORY", help="default: beside the results")
    return top


def options(args: argparse.Namespace, cases: dict[str, case.AnyCase]) -> run.Options:
    """Checked options; anything unknown is named."""
    _known("--op", args.op, list(cases))
    _known("--dtype", args.dtype, list(case.DTYPES))
    _known("--pass", args.phase, list(case.PASSES))
    if args.shape:
        if not args.op or len(args.op) != 1:
            raise BenchError("bench: --shape must come with one --op")
        letters = cases[args.op[0]].letters
        if any(len(shape) != len(letters.split(",")) or min(shape) < 1 for shape in args.shape):
            raise BenchError(f"bench: --shape must be positive sizes {letters}, got {args.shape}")
    found = run.Options(args.device, args.preset, args.op, args.shape, args.dtype, case=args.case)
    if args.phase:
        found.passes = args.phase
    return found


def _known(option: str, given: list[str] | None, known: list[str]) -> None:
    for name in given or []:
        if name not in known:
            raise BenchError(f"bench: {option} must be among {', '.join(known)}, got {name!r}")


def command_list(args: argparse.Namespace) -> int:
    for job in run.jobs(cases := case.load(), options(args, cases)):
        print(job.identifier)
    print("\nvariants: " + ", ".join(PLAIN))
    problems = {name: public_problem(args.device, name) for name in PUBLIC}
    problems |= {f"randfuse {name}": backend_problem(args.device, name) for name in BACKENDS[args.device]}
    for name, problem in problems.items():
        print(f"{name}: {'available' if problem is None else problem}")
    return 0


def command_run(args: argparse.Namespace) -> int:
    cases = case.load()
    chosen = options(args, cases)
    names = [*PLAIN, *PUBLIC, *dict.fromkeys(n for per_device in BACKENDS.values() for n in per_device)]
    _known("--backend", args.backend, names)
    chosen.backends, chosen.cold, chosen.rounds = args.backend, args.cold, args.rounds
    chosen.threads = args.threads or chosen.threads
    if not run.jobs(cases, chosen):
        raise BenchError("bench: the options must leave at least one case; see `list`")
    if args.device == "cpu":
        kept = all(os.environ.get(name) == value for name, value in MALLOC.items())
        print(f"malloc: {'keeps large blocks, for all variants alike' if kept else 'default, large outputs fault'}")
        if warning := env.busy():
            print(f"warning: {warning}")
    path = args.out or Path("bench-out") / f"{datetime.now(timezone.utc):%Y-%m-%dT%H%M%SZ}.json"
    found = run.run(cases, chosen, path)
    print(table.render(found))
    print(f"\n{found.environment['machine']}; {chosen.cache} caches; medians of {len(found.rows)} rows -> {path}")
    if found.interrupted:
        print("interrupted: the file holds the rows that were finished")
    return found.status()


def command_compare(args: argparse.Namespace) -> int:
    verdicts = compare.compare(results.load(args.old), results.load(args.new), force=args.force)
    print(compare.render(verdicts))
    return 1 if args.fail_above is not None and compare.worst(verdicts) > 1 + args.fail_above else 0


def command_report(args: argparse.Namespace) -> int:
    for path in report.write(results.load(args.results), args.out or args.results.parent, args.results.stem):
        print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    guard_onednn()
    commands = {"list": command_list, "run": command_run, "compare": command_compare, "report": command_report}
    try:
        return commands[args.command](args)
    except (BenchError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2


def keep_memory(argv: list[str]) -> None:
    """Start this process again with glibc told to keep large blocks: malloc reads its settings only at the start."""
    if argv[:1] == ["run"] and "--default-malloc" not in argv and not any(name in os.environ for name in MALLOC):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **MALLOC})


if __name__ == "__main__":
    keep_memory(sys.argv[1:])
    sys.exit(main())
