"""`run`: for each shape and dtype, gate every variant, then time those that passed, taking turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from .. import keys
from . import env, gate, memory, roofline, timing
from .case import DTYPES, PASSES, PRESETS, Case, Inputs, Shape
from .progress import Progress
from .results import Results, Row
from .variants import Variant, choice, variants

ROUNDS = {"smoke": 5, "default": 15, "full": 41}
KEY = 2024  # of the gate; timed calls draw their keys, as training does


@dataclass
class Options:
    """What to run; the defaults are those of the command line."""

    device: str = "cpu"
    preset: str = "default"
    ops: list[str] | None = None
    shapes: list[Shape] | None = None  # in place of the preset's
    dtypes: list[str] | None = None
    passes: list[str] = field(default_factory=lambda: list(PASSES))
    backends: list[str] | None = None
    threads: list[int] = field(default_factory=lambda: [torch.get_num_threads()])
    cold: bool = True
    rounds: int | None = None
    case: str = ""  # part of the identifier of the cases to run

    def __post_init__(self) -> None:
        assert self.preset in PRESETS, f"bench: preset must be one of {PRESETS}, got {self.preset!r}"

    @property
    def cache(self) -> str:
        return "cold" if self.cold else "hot"


@dataclass(frozen=True)
class Job:
    """One row group: a case at a shape, dtype and pass."""

    case: Case
    shape: Shape
    dtype: str
    phase: str

    @property
    def identifier(self) -> str:
        """What `list` prints and `--case` selects, "dropout/512x4096/fp32/forward" for example."""
        return "/".join([self.case.op, "x".join(map(str, self.shape)), self.dtype, self.phase])


def jobs(cases: dict[str, Case], options: Options) -> list[Job]:
    """All row groups of a run, in order; groups of one gate stand together."""
    found = []
    for case in cases.values():
        if options.ops is not None and case.op not in options.ops:
            continue
        for shape in options.shapes or case.shapes[options.preset][options.device]:
            for dtype in options.dtypes or case.dtypes(options.device):
                found += [Job(case, shape, dtype, phase) for phase in options.passes]
    return [job for job in found if options.case in job.identifier]


def run(cases: dict[str, Case], options: Options, clock: timing.Clock | None = None) -> Results:
    """Rows as they get finished; Ctrl-C returns those there are and marks the results."""
    planned = jobs(cases, options)
    results = Results(env.capture(options.device))
    clock = clock or timing.clock(options.device, options.cold)
    try:
        with Progress(len(planned) * len(options.threads)) as progress:
            for threads in options.threads:
                torch.set_num_threads(threads)
                progress.note(f"measuring the roofline ({options.cache}, {threads} threads)")
                roof = roofline.measure(clock, options.device, sorted({job.dtype for job in planned}))
                results.roofline[f"{options.device}, {threads} threads, {options.cache}"] = roof.to_json()
                for rows in _groups(planned, options, threads, roof, clock, progress):
                    results.rows += rows
    except KeyboardInterrupt:
        results.interrupted = True
    return results


def _groups(
    planned: list[Job],
    options: Options,
    threads: int,
    roof: roofline.Roofline,
    clock: timing.Clock,
    progress: Progress,
) -> Iterator[list[Row]]:
    gated: tuple | None = None
    for job in planned:
        progress.note(f"{job.identifier}, {threads} threads")
        if gated != (job.case, job.shape, job.dtype):
            gated = (job.case, job.shape, job.dtype)
            torch.manual_seed(0)
            inputs = job.case.setup(job.shape, DTYPES[job.dtype], options.device)
            entrants = [
                (variant, *_gate(job, variant, inputs))
                for variant in variants(
                    job.case, options.device, choice(options.device, options.preset, options.backends)
                )
            ]
        rows = [_row(job, options, threads, v, problem, wrong) for v, problem, wrong in entrants]
        least = roof.seconds(
            job.case.cost(job.shape, DTYPES[job.dtype].itemsize, job.phase != "forward"), dtype=job.dtype
        )
        _measure(job, rows, {f"{v.name}": v for v, _, _ in entrants}, inputs, least, clock, options)
        progress.step()
        yield rows


def _gate(job: Job, variant: Variant, inputs: Inputs) -> tuple[str | None, bool]:
    """The problem of a variant, if it has one, and whether that means wrong results."""
    if variant.problem:
        return variant.problem, False
    key = keys.key(KEY, inputs["x"].device)
    forward = partial(job.case.randfuse, key=key) if variant.fused else variant.forward
    expected = job.case.mask(job.shape, key) if variant.fused else None
    try:
        with variant.context:
            gate.check(job.case, forward, inputs, expected=expected, floor=variant.floor)
    except gate.GateError as error:
        return f"wrong: {error}", True
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}", False
    except Exception as error:  # torch.compile without a compiler is absent; anything else of that kind is a failure
        return f"{type(error).__name__}: {str(error).splitlines()[0]}", variant.name != "compile"
    return None, False


def _row(job: Job, options: Options, threads: int, variant: Variant, problem: str | None, wrong: bool) -> Row:
    words = ["python -m randfuse.bench run --device", options.device, "--op", job.case.op]
    words += ["--shape", ",".join(map(str, job.shape)), "--dtype", job.dtype, "--pass", job.phase]
    backend = variant.name.removeprefix("randfuse ")
    words += ["--backend", ",".join(dict.fromkeys([backend, "eager", "floor"])), "--threads", str(threads)]
    return Row(
        op=job.case.op,
        shape=job.shape,
        dtype=job.dtype,
        phase=job.phase,
        device=options.device,
        threads=threads,
        cache=options.cache,
        variant=variant.name,
        command=" ".join([*words, f"--{options.cache}"]),
        problem=problem,
        wrong=wrong,
    )


def _measure(
    job: Job,
    rows: list[Row],
    entrants: dict[str, Variant],
    inputs: Inputs,
    least: float,
    clock: timing.Clock,
    options: Options,
) -> None:
    """Fill in times, memory and launches of the rows without a problem."""
    backward = job.phase != "forward"
    leaves = {n: t.detach().requires_grad_(backward and n in job.case.differentiable) for n, t in inputs.items()}
    samplers = {}
    sound = [row for row in rows if not row.problem]
    for row in sound:
        call = partial(_call, job.case, entrants[row.variant], leaves, backward)
        if backward:
            with entrants[row.variant].context:
                row.saved_bytes = memory.saved_for_backward(entrants[row.variant].forward, leaves)
        row.peak_bytes = memory.peak(call, options.device)
        if options.device == "cuda":
            row.launches = memory.launches(call)
        samplers[row.variant], row.method = clock.sampler(call)
    samples = timing.interleave(samplers, options.rounds or ROUNDS[options.preset])
    for row in sound:
        row.samples, row.least = samples[row.variant], least
        row.problem = roofline.impossible(timing.summarise(row.samples).median, least)
        row.wrong = row.problem is not None


def _call(case: Case, variant: Variant, leaves: Inputs, backward: bool) -> object:
    with variant.context, torch.set_grad_enabled(backward):
        out = variant.forward(leaves)
        return torch.autograd.grad(out, [leaves[n] for n in case.differentiable], leaves["grad"]) if backward else out
