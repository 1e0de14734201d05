"""`run`: for each shape and dtype, gate every variant, then time those that passed, taking turns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import keys
from . import BenchError, env, gate, memory, roofline, timing
from .case import DTYPES, PASSES, PRESETS, AnyCase, Inputs, Shape
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
        if self.preset not in PRESETS:
            raise BenchError(f"bench: preset must be among {', '.join(PRESETS)}, got {self.preset!r}")

    @property
    def cache(self) -> str:
        return "cold" if self.cold else "hot"


@dataclass(frozen=True)
class Job:
    """One row group: a case at a shape, dtype and pass."""

    case: AnyCase
    shape: Shape
    dtype: str
    phase: str

    @property
    def identifier(self) -> str:
        """What `list` prints and `--case` selects, "dropout/512x4096/fp32/forward" for example."""
        return "/".join([self.case.op, "x".join(map(str, self.shape)), self.dtype, self.phase])

    @property
    def backward(self) -> bool:
        return self.phase != "forward"


def jobs(cases: dict[str, AnyCase], options: Options) -> list[Job]:
    """All row groups of a run; the passes of one shape and dtype, which share inputs and gate, stand together."""
    found = []
    for case in cases.values():
        if options.ops is not None and case.op not in options.ops:
            continue
        for shape in options.shapes or case.shapes[options.preset][options.device]:
            for dtype in options.dtypes or case.dtypes(options.device):
                found += [Job(case, shape, dtype, phase) for phase in options.passes if phase in case.passes]
    return [job for job in found if options.case in job.identifier]


def run(
    cases: dict[str, AnyCase],
    options: Options,
    save: Path,
    clock: timing.Clock | None = None,
    facts: dict[str, Any] | None = None,
) -> Results:
    """All rows; after Ctrl-C those that were finished. The file `save` is written after each group of rows.

    `facts` join the environment; `clock` is for tests.
    """
    planned = jobs(cases, options)
    results = Results({**env.capture(options.device), **(facts or {})}, interrupted=True)
    try:
        with Progress(len(planned) * len(options.threads)) as progress:
            for threads in options.threads:
                torch.set_num_threads(threads)
                session = Session(options, threads, {job.dtype for job in planned}, clock)
                progress.note("measuring the roofline")
                session.probe()
                results.roofline[f"{options.device}, {threads} threads, {options.cache}"] = asdict(session.roof)
                for rows in session.measure(planned, progress):
                    results.rows += rows
                    results.save(save)
                    progress.step()
        results.interrupted = False
    except KeyboardInterrupt:
        pass
    results.save(save)
    return results


class Session:
    """A run at one number of threads: its clock and its roofline."""

    def __init__(self, options: Options, threads: int, dtypes: set[str], clock: timing.Clock | None) -> None:
        self.options, self.threads, self.dtypes = options, threads, sorted(dtypes)
        self.clock = clock or timing.clock(options.device, options.cold)
        self.hot = clock or timing.clock(options.device, cold=False)
        self.roof = roofline.Roofline()

    def probe(self) -> None:
        self.roof.improve(roofline.measure(self.clock, self.hot, self.options.device, self.dtypes))

    def measure(self, planned: list[Job], progress: Progress) -> Iterable[list[Row]]:
        gated: tuple | None = None
        for job in planned:
            progress.note(f"{job.identifier}, {self.threads} threads")
            if gated != (job.case, job.shape, job.dtype):
                gated = (job.case, job.shape, job.dtype)
                torch.manual_seed(0)
                inputs = job.case.setup(job.shape, DTYPES[job.dtype], self.options.device)
                names = choice(self.options.device, self.options.preset, self.options.backends)
                entrants = [(v, *_gate(job, v, inputs)) for v in variants(job.case, self.options.device, names)]
            rows = [(v, self._row(job, v, problem, wrong)) for v, problem, wrong in entrants]
            self._time(job, [(v, row) for v, row in rows if not row.problem], inputs)
            yield [row for _, row in rows]

    def _row(self, job: Job, variant: Variant, problem: str | None, wrong: bool) -> Row:
        device, cache = self.options.device, self.options.cache
        peers = dict.fromkeys([variant.name.removeprefix("randfuse "), "eager", "floor"])
        command = (
            f"python -m randfuse.bench run --device {device} --op {job.case.op} "
            f"--shape {','.join(map(str, job.shape))} --dtype {job.dtype} --pass {job.phase} "
            f"--backend {','.join(peers)} --threads {self.threads} --{cache}"
        )
        return Row(
            op=job.case.op,
            shape=job.shape,
            dtype=job.dtype,
            phase=job.phase,
            device=device,
            threads=self.threads,
            cache=cache,
            variant=variant.name,
            command=command,
            problem=problem,
            wrong=wrong,
        )

    def _time(self, job: Job, sound: list[tuple[Variant, Row]], inputs: Inputs) -> None:
        """Fill in times, memory and launches."""
        wanted = job.case.differentiable if job.backward else ()
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
        samplers = {}
        for variant, row in sound:
            call = partial(_call, job, variant, leaves)
            if job.backward:
                with variant.context:
                    row.saved_bytes = memory.saved_for_backward(variant.forward, leaves)
            row.peak_bytes = memory.peak(call, row.device)
            row.launches = memory.launches(call) if row.device == "cuda" else None
            samplers[row.variant], row.method = self.clock.sampler(call)
        samples = timing.interleave(samplers, self.options.rounds or ROUNDS[self.options.preset])
        for _, row in sound:
            row.samples = samples[row.variant]
            row.least, row.problem = self._judge(job, timing.summarise(row.samples).median)
            row.wrong = row.problem is not None

    def _judge(self, job: Job, median: float) -> tuple[float, str | None]:
        """Least time by the roofline, and the reason to reject the median. Before that the machine gets a second look:
        a neighbour may have been busy while it was probed."""
        cost = job.case.cost(job.shape, DTYPES[job.dtype].itemsize, job.backward)
        least = self.roof.seconds(cost, job.dtype)
        if roofline.impossible(median, least):
            self.probe()
            least = self.roof.seconds(cost, job.dtype)
        return least, roofline.impossible(median, least)


def _gate(job: Job, variant: Variant, inputs: Inputs) -> tuple[str | None, bool]:
    """The problem of a variant, if it has one, and whether that means wrong results."""
    if variant.problem:
        return variant.problem, False
    key = keys.key(KEY, inputs["x"].device)
    forward = partial(job.case.randfuse, key=key) if variant.fused else variant.forward
    try:
        with variant.context:
            gate.admit(job.case, job.shape, forward, inputs, key if variant.fused else None, variant.name == "floor")
    except gate.GateError as error:
        return f"wrong: {error}", True
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}", False
    except Exception as error:
        # torch.compile is absent where there is no compiler for it; what else raises is broken.
        return f"{type(error).__name__}: {str(error).splitlines()[0]}", variant.name != "compile"
    return None, False


def _call(job: Job, variant: Variant, leaves: Inputs) -> object:
    with variant.context, torch.set_grad_enabled(job.backward):
        out = variant.forward(leaves)
        if not job.backward:
            return out
        return torch.autograd.grad(out, [leaves[n] for n in job.case.differentiable], leaves["grad"])
