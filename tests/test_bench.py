"""The benchmark harness, with clocks that lie on demand."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse.bench import (
    BenchError,
    __main__,
    case,
    compare,
    gate,
    memory,
    report,
    results,
    roofline,
    timing,
    variants,
)
from randfuse.bench.case import Cost, Inputs
from randfuse.bench.run import Options, jobs, run
from randfuse.integrations import flashinfer, vllm
from torch import Tensor

CASES = case.load()
SMALL = {
    "block_dropout_linear": (300, 256, 8),
    "categorical_sample": (8, 1500),
    "speculative_accept": (3, 2, 1500),
    "speculative_accept_one_hot": (3, 2, 1500),
    "speculative_accept_tree": (3, 6, 1500),
    "column_dropout_linear": (24, 4096, 8),
    "dropconnect_linear": (24, 64, 8),
    "dropout": (8, 96),
    "dropout_linear": (24, 64, 8),
    "linear_categorical_sample": (8, 16, 1500),
    "linear_dropout": (24, 16, 40),
    "lora_linear": (24, 64, 8, 4),
    "lora_updates": (24, 64, 8, 4, 2),
    "masked_diffusion": (2, 300, 50),
    "mixout_linear": (24, 64, 8),
    "multi_sample_cross_entropy": (24, 64, 8, 4),
    "multi_sample_linear": (24, 64, 8, 4),
    "multi_sample_mse": (24, 64, 2, 4),
    "multi_sample_scale": (24, 64, 8, 4),
}


class FakeClock:
    """Runs the call and says what it is told: `seconds` of the n-th sample taken by anybody."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds, self.taken = seconds, 0

    def sampler(self, call: timing.Call) -> tuple[Callable[[], float], str]:
        def sample() -> float:
            call()
            self.taken += 1
            return self.seconds(self.taken)

        return sample, "fake"


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "PROBE_BYTES", {"cpu": (1 << 16,)})
    monkeypatch.setattr(roofline, "PROBE_MATMULS", {"cpu": ((32, 32, 32),)})


# --- timing


def test_order_rotates():
    log: list[str] = []
    samplers = {name: lambda name=name: log.append(name) or 1.0 for name in "abc"}
    samples = timing.interleave(samplers, 4)
    assert "".join(log) == "abcbcacababc", "each round begins one place later"
    assert {name: len(s) for name, s in samples.items()} == {"a": 4, "b": 4, "c": 4}, "one sample a round"


def test_interleaving_survives_drift():
    """A machine that slows down tenfold during the run: measured one after the other, the twin looks twice as slow."""
    clock = FakeClock(lambda n: 1.0 + n * 9 / 80)
    samplers = {name: clock.sampler(lambda: None)[0] for name in ("one", "twin")}
    medians = [timing.summarise(s).median for s in timing.interleave(samplers, 40).values()]
    assert medians[1] / medians[0] == pytest.approx(1, abs=0.05), f"twins must agree, got {medians}"
    clock.taken = 0
    one, twin = ([samplers[name]() for _ in range(40)] for name in ("one", "twin"))
    assert timing.summarise(twin).median / timing.summarise(one).median > 2, "the control must show the drift"


def test_summary():
    assert timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Summary(3.0, 2.0, 5.0, 1.0, 5)


def test_cold_evicts_more_than_the_cache():
    cold, hot = timing.CpuClock(cold=True), timing.CpuClock(cold=False)
    assert cold.evict.nbytes > timing.last_level_cache(), "the buffer must not fit the cache"
    assert hot.evict.nbytes == 0, "hot runs evict nothing"
    sample, method = hot.sampler(lambda: torch.ones(10))
    assert method == "wall clock"
    assert 0 < sample() < 1, "seconds"


# --- correctness gate


def checked(op: str, forward: Callable[[Inputs], Tensor], *, fused: bool, floor: bool = False) -> None:
    torch.manual_seed(1)
    inputs = CASES[op].setup(SMALL[op], torch.float32, "cpu")
    gate.admit(CASES[op], SMALL[op], forward, inputs, randfuse.key(7) if fused else None, floor)


@pytest.mark.parametrize("op", CASES)
def test_gate_passes_what_is_right(op: str):
    checked(op, lambda inputs: CASES[op].randfuse(inputs, randfuse.key(7)), fused=True)
    checked(op, CASES[op].floor, fused=False, floor=True)
    for name, forward in CASES[op].baselines().items():
        assert name in variants.PLAIN or name in variants.PUBLIC, f"{name}: unknown baseline"
        if name in variants.PLAIN:
            checked(op, forward, fused=False)


class Kernels:
    """Samplers of others by those that `randfuse.integrations` has for their signatures, and what they were given."""

    def __init__(self) -> None:
        self.dtypes: dict[str, list[torch.dtype]] = {}

    def softmax(self, logits: Tensor, temperature: Tensor | None = None, enable_pdl: bool | None = None) -> Tensor:
        assert logits.dim() == 2, "rows of logits"
        return logits.softmax(-1, dtype=torch.float32)

    def of(self, module: object, name: str) -> Callable:
        def call(*args, **kwargs):
            bound = inspect.signature(getattr(module, name)).bind(*args, **kwargs).arguments
            self.dtypes[name] = [v.dtype for v in bound.values() if isinstance(v, Tensor)]
            return getattr(module, name)(*args, **kwargs)

        return call


def test_public_kernels_are_called_by_their_signatures(monkeypatch: pytest.MonkeyPatch):
    """Their integrations have the parameters of the real ones (test_sampler_integrations.py and others)."""
    kernels, sampling, root = Kernels(), ModuleType("flashinfer.sampling"), ModuleType("flashinfer")
    runner, long = ModuleType("vllm"), "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"
    sampling.softmax, root.sampling = kernels.softmax, sampling
    for name in ("sampling_from_logits", "sampling_from_probs", "chain_speculative_sampling"):
        setattr(sampling, name, kernels.of(flashinfer, name))
    runner.rejection_sample = kernels.of(vllm, "rejection_sample")
    modules = {"flashinfer": root, "flashinfer.sampling": sampling, long: runner}
    while "." in long:
        long = long.rpartition(".")[0]
        modules[long] = ModuleType(long)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = [(op, name) for op in CASES for name in CASES[op].baselines() if name in variants.PUBLIC]
    assert {op for op, _ in found} == {"categorical_sample", "speculative_accept", "speculative_accept_one_hot"}
    for op, name in found:
        checked(op, CASES[op].baselines()[name], fused=False)
    fp32, ids, word = torch.float32, torch.int32, torch.int64
    assert kernels.dtypes == {
        "sampling_from_logits": [fp32, word, word],
        "sampling_from_probs": [fp32, word, word],
        "chain_speculative_sampling": [fp32, ids, fp32, word, word],
        "rejection_sample": [fp32, word, ids, word, ids, ids, ids, fp32, word],  # the last call is of one-hot drafts
    }


def test_public_kernels_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    case_ = CASES["speculative_accept"]
    rows = {v.name: v.problem for v in variants.variants(case_, "cuda", variants.choice("cuda", "smoke", None))}
    assert rows["flashinfer"] == "flashinfer is not installed; `pip install flashinfer-python`"
    assert rows["vllm"] == "vllm is not installed; `pip install vllm`"
    assert rows["eager"] is None
    assert "flashinfer_probs" not in rows, "only those that the case has"
    assert not set(variants.PUBLIC) & set(variants.choice("cpu", "default", None)), "nothing is said on the CPU"
    (asked,) = variants.variants(case_, "cpu", ["vllm"])
    assert asked.problem == "runs on GPUs only; use --device cuda"
    monkeypatch.setattr(variants, "find_spec", lambda name: object())
    assert variants.public_problem("cuda", "flashinfer") is None


def test_gate_reads_as_many_tokens_as_count():
    def undefined_after_the_first(inputs: Inputs) -> tuple[Tensor, Tensor]:
        tokens = torch.full((3, 3), 10**9)
        tokens[:, 0] = 7
        return tokens, torch.ones(3, dtype=torch.int32)

    checked("speculative_accept", undefined_after_the_first, fused=False)


class OtherBackward(torch.autograd.Function):
    """Dropout by key 7 forward and by key 8 backward."""

    @staticmethod
    def forward(ctx, x):
        return randfuse.dropout(x, 0.1, key=randfuse.key(7))

    @staticmethod
    def backward(ctx, grad):
        return randfuse.dropout(grad, 0.1, key=randfuse.key(8))


class TooSteep(torch.autograd.Function):
    """Dropout by key 7 whose gradient is 1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return randfuse.dropout(x, 0.1, key=randfuse.key(7))

    @staticmethod
    def backward(ctx, grad):
        return randfuse.dropout(grad * 1.01, 0.1, key=randfuse.key(7))


@pytest.mark.parametrize(
    ("wrong", "fused", "message"),
    [
        (lambda i: randfuse.dropout(i["x"], 0.1, key=randfuse.key(8)), True, "decisions.*the first at"),
        (lambda i: randfuse.dropout(i["x"], 0.1, key=randfuse.key(7)) * 1.001, True, "output: max error"),
        (lambda i: OtherBackward.apply(i["x"]), True, "decisions"),
        (lambda i: TooSteep.apply(i["x"]), True, "gradient of x: max error"),
        (lambda i: F.dropout(i["x"], 0.5), False, r"dropped \d+ of 768, expected 77"),
        (lambda i: F.dropout(i["x"], 0.1, training=False), False, "dropped 0 of 768"),
        (lambda i: F.dropout(i["x"] * 1.01, 0.1), False, "max error"),
    ],
)
def test_gate_refuses_what_is_wrong(wrong: Callable[[Inputs], Tensor], fused: bool, message: str):
    with pytest.raises(gate.GateError, match=message):
        checked("dropout", wrong, fused=fused)


@pytest.mark.parametrize(("wrong", "fused", "message"), [
    (lambda i: randfuse.categorical_sample(i["x"], 1.1, key=randfuse.key(7)), True, "tokens: .* places differ"),
    (lambda i: torch.where(i["x"].isinf(), 1.0, 0.0).argmax(-1), False, "a token of no probability was drawn"),
])  # fmt: skip
def test_gate_refuses_wrong_tokens(wrong: Callable[[Inputs], Tensor], fused: bool, message: str):
    inputs = CASES["categorical_sample"].setup((64, 1500), torch.float32, "cpu")
    inputs["x"][:, 5] = -torch.inf
    with pytest.raises(gate.GateError, match=message):
        gate.admit(CASES["categorical_sample"], (64, 1500), wrong, inputs, randfuse.key(7) if fused else None, False)


def test_gate_refuses_one_wrong_decision():
    def flip_one(inputs: Inputs) -> Tensor:
        mask = CASES["dropout"].mask(SMALL["dropout"], randfuse.key(7))
        mask[3, 5] ^= True
        return torch.where(mask, inputs["x"] * CASES["dropout"].scale(exactly=True), 0)

    with pytest.raises(gate.GateError, match=r"1 of 768 places differ, the first at \(3, 5\)"):
        checked("dropout", flip_one, fused=True)


# --- memory


def test_bytes_saved_for_backward():
    x = torch.randn(32, 16, requires_grad=True)
    mask = torch.rand(32, 16) > 0.1
    assert memory.saved_for_backward(lambda i: F.linear(i["x"], i["w"]), {"x": x, "w": torch.randn(4, 16)}) == 0
    assert memory.saved_for_backward(lambda i: i["x"] * mask.float(), {"x": x}) == 32 * 16 * 4, "a float mask"
    layer = CASES["dropout_linear"]
    leaves = {n: t.requires_grad_() for n, t in layer.setup((24, 64, 8), torch.float32, "cpu").items()}
    assert memory.saved_for_backward(layer.baselines()["eager"], leaves) >= 24 * 64 * 4, "eager keeps a copy of x"


def test_peak_of_a_call():
    chain = memory.peak(lambda: (torch.ones(1 << 20) + 1) * 2, "cpu")
    assert chain == pytest.approx(2 * (4 << 20), abs=64), "an operand and a result of 4 MiB live at once"
    assert memory.peak(lambda: None, "cpu") == 0


# --- roofline


def test_roofline_charges_copies_reads_and_products():
    roof = roofline.Roofline(copy={1: 10.0}, read={1: 20.0}, fill={1: 5.0}, matmul={"fp32": 100.0})
    assert roof.seconds(Cost(50, 50, 0), "fp32") == pytest.approx(10), "a copy takes the time of a copy"
    assert roof.seconds(Cost(50, 10, 0), "fp32") == pytest.approx(2 + 2), "unpaired reads at the speed of reads"
    assert roof.seconds(Cost(0, 10, 0), "fp32") == pytest.approx(2), "unpaired writes at that of fills"
    assert roof.seconds(Cost(50, 50, 2000), "fp32") == pytest.approx(20), "whichever takes longer"
    roof.improve(roofline.Roofline(copy={1: 40.0}, read={1: 1.0}))
    assert (roof.copy, roof.read) == ({1: 40.0}, {1: 20.0}), "the better rate of both"


def test_rates_of_the_neighbouring_sizes():
    rates = {10: 3.0, 100: 2.0, 1000: 1.0}
    assert [roofline._near(rates, size) for size in (1, 10, 50, 500, 5000)] == [3.0, 3.0, 3.0, 2.0, 1.0]


@pytest.mark.usefixtures("small_probes")
def test_impossible_results_get_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With every call taking one second, a case that claims more bytes than a copy can move must be refused."""
    options = Options(ops=["dropout"], shapes=[(8, 96)], dtypes=["fp32"], backends=["eager", "reference"], rounds=3)
    honest = run(CASES, options, tmp_path / "a.json", FakeClock(lambda n: 1.0))
    assert all(row.summary for row in honest.rows), f"possible: {[row.problem for row in honest.rows]}"
    monkeypatch.setattr(type(CASES["dropout"]), "cost", lambda *_: Cost(1 << 40, 1 << 40, 0))
    false = run(CASES, options, tmp_path / "b.json", FakeClock(lambda n: 1.0))
    assert all(row.summary is None and row.wrong for row in false.rows), "no number, and an exit status"
    assert "impossible: check the byte count" in str(false.rows[0].problem)
    assert false.status() == 1
    assert roofline.impossible(1.0, 1.04) is None, "five percent are noise"


# --- results and comparison


def row(samples: list[float], **changes) -> results.Row:
    place = {"op": "dropout", "shape": (8, 8), "dtype": "fp32", "phase": "forward"}
    how = {"device": "cpu", "threads": 1, "cache": "cold", "variant": "eager", "command": "x"}
    return results.Row(**{**place, **how, "samples": samples, **changes})


def around(centre: float, spread: float = 0.002, n: int = 25) -> list[float]:
    return [centre * (1 + spread * math.sin(3.7 * i)) for i in range(n)]


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (around(1.0), "SAME"),
        (around(1.01), "SAME"),
        (around(1.2), "SLOW"),
        (around(0.8), "FAST"),
        (around(1.1, spread=0.6, n=9), "AMBIGUOUS"),
    ],
)
def test_verdicts(new: list[float], verdict: str):
    assert compare.judge(around(1.0), new)[0] == verdict, f"{compare.judge(around(1.0), new)}"


def test_no_verdict_without_a_difference():
    """Of 200 pairs drawn from one distribution with 10 % noise, at most 1 in 50 may be called FAST or SLOW."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for i in range(200):
        old, new = (1 + 0.1 * torch.randn(2, 15, generator=generator)).tolist()
        wrong += compare.judge(old, new, seed=i)[0] in ("FAST", "SLOW")
    assert wrong <= 4, f"{wrong} of 200 verdicts on equal distributions"


def test_compare_pairs_rows_and_machines(tmp_path: Path, capsys: pytest.CaptureFixture):
    old = results.Results({"machine": "A"}, rows=[row(around(1.0)), row(around(1.0), dtype="bf16")])
    new = results.Results({"machine": "A"}, rows=[row(around(1.3)), row([], variant="compile", problem="none")])
    verdicts = compare.compare(old, new)
    assert [v.verdict for v in verdicts] == ["SLOW", "MISSING", "MISSING"], "rows pair by what they measure"
    old.save(tmp_path / "old.json")
    new.save(tmp_path / "new.json")
    command = ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert __main__.main(command) == 0, "a comparison alone is no failure"
    assert __main__.main([*command, "--fail-above", "20%"]) == 1, "30 % slower"
    assert __main__.main([*command, "--fail-above", "40%"]) == 0
    assert "1 SLOW" in capsys.readouterr().out
    results.Results({"machine": "B"}, rows=new.rows).save(tmp_path / "new.json")
    assert __main__.main(command) == 2, "another machine"
    assert "must come from one machine, got 'A' and 'B'" in capsys.readouterr().err
    assert __main__.main([*command, "--force"]) == 0


def test_results_survive_the_disk(tmp_path: Path):
    path = tmp_path / "deep" / "r.json"
    before = results.Results({"machine": "A"}, {"cpu": {}}, [row([1.0, 2.0, 3.0], least=0.5)])
    before.save(path)
    assert json.loads(path.read_text())["rows"][0]["summary"]["median"] == 2.0, "readers find the median"
    after = results.load(path)
    assert after.rows[0].samples == [1.0, 2.0, 3.0], "raw samples are kept"
    assert after.rows[0].group == before.rows[0].group
    path.write_text('{"schema": 99}')
    with pytest.raises(BenchError, match="must be a result file of schema 1, got schema 99"):
        results.load(path)


def test_ratios():
    peers = [row([4.0]), row([1.0], variant="floor"), row([2.0], variant="randfuse cpu", least=1.5)]
    assert results.ratios(peers[2], peers) == {"eager": 2.0, "floor": 2.0, "roofline": 0.75}
    assert results.ratios(row([], problem="none"), peers) == {"eager": None, "floor": None, "roofline": None}


# --- the whole command


class Balance(HTMLParser):
    """Tags that are opened and not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> must close what was opened last"


@pytest.mark.usefixtures("small_probes")
def test_run_and_report_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roofline, "TOLERANCE", 1e9)  # shapes this small say nothing about a roofline
    out = tmp_path / "run.json"
    command = [
        "run",
        "--device",
        "cpu",
        "--op",
        "dropout_linear",
        "--shape",
        "24,64,8",
        "--dtype",
        "fp32,bf16",
        "--hot",
    ]
    command += ["--backend", "eager,floor,reference,triton", "--rounds", "3", "--threads", "1", "--out", str(out)]
    threads = torch.get_num_threads()
    try:
        assert __main__.main(command) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "faster than eager" in printed, "the table"
    assert "no number for randfuse triton: Triton's kernels run on the CPU only" in printed, "the reason of the absent"
    found = results.load(out)
    assert len(found.rows) == 2 * 2 * 4, "dtypes, passes, variants"
    numbers = [r for r in found.rows if r.variant != "randfuse triton"]
    assert all(r.summary and r.summary.n == 3 and r.cache == "hot" and r.threads == 1 for r in numbers), "samples"
    assert "--shape 24,64,8 --dtype fp32 --pass forward --backend reference,eager,floor" in found.rows[2].command
    assert {"machine", "cpu", "commit", "versions", "date", "command"} <= set(found.environment), "the environment"
    assert __main__.main(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    html = (tmp_path / "page" / "run.html").read_text()
    checker = Balance()
    checker.feed(html)
    assert not checker.open, f"left open: {checker.open}"
    assert "data:image/png;base64," in html, "pictures are embedded"
    assert "src='http" not in html, "nothing is loaded"
    assert (tmp_path / "page" / "run-dropout_linear.png").read_bytes().startswith(b"\x89PNG"), "pictures are files too"


@pytest.mark.usefixtures("small_probes")
def test_a_wrong_variant_gets_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(CASES["dropout"]), "randfuse", lambda self, i, key=None: F.dropout(i["x"], self.p))
    options = Options(ops=["dropout"], shapes=[(8, 96)], dtypes=["fp32"], backends=["eager", "reference"], rounds=2)
    found = run(CASES, options, tmp_path / "r.json", FakeClock(lambda n: 1.0))
    eager, fused = (next(r for r in found.rows if r.variant == name) for name in ("eager", "randfuse reference"))
    assert eager.summary is not None, "the others are measured"
    assert fused.summary is None, "no number"
    assert "decisions" in str(fused.problem)
    assert found.status() == 1


@pytest.mark.usefixtures("small_probes")
def test_a_killed_run_leaves_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file is there after the first group, not only at the end, and says that rows are missing."""
    path, seen = tmp_path / "r.json", []
    setup = CASES["dropout"].setup

    def look(shape, dtype, device):
        seen.append(results.load(path) if path.exists() else None)
        return setup(shape, dtype, device)

    monkeypatch.setattr(CASES["dropout"], "setup", look)
    options = Options(ops=["dropout"], shapes=[(8, 96)], backends=["eager"], rounds=2)
    assert run(CASES, options, path, FakeClock(lambda n: 1.0)).status() == 0
    assert seen[0] is None, "nothing before the first group"
    assert len(seen[1].rows) == 2, "both passes of fp32 before bf16 begins"
    assert seen[1].interrupted, "an unfinished file says so"
    assert not results.load(path).interrupted, "a finished one does not"


@pytest.mark.usefixtures("small_probes")
def test_interrupt_keeps_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dropout = CASES["dropout"]
    setup = dropout.setup

    def interrupted_at_bf16(shape, dtype, device):
        if dtype == torch.bfloat16:
            raise KeyboardInterrupt
        return setup(shape, dtype, device)

    monkeypatch.setattr(dropout, "setup", interrupted_at_bf16)
    options = Options(ops=["dropout"], shapes=[(8, 96)], backends=["eager"], rounds=2)
    found = run(CASES, options, tmp_path / "r.json", FakeClock(lambda n: 1.0))
    assert found.status() == 130
    assert [r.dtype for r in results.load(tmp_path / "r.json").rows] == ["fp32", "fp32"], (
        "finished rows are in the file"
    )


def test_list_names_cases_and_reasons(capsys: pytest.CaptureFixture):
    assert __main__.main(["list", "--device", "cpu", "--op", "dropout"]) == 0
    text = capsys.readouterr().out
    assert "dropout/512x4096/bf16/forward+backward" in text, "cases"
    assert "randfuse reference: available" in text, "backends"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], f"--op must be among {', '.join(sorted(CASES))}, got 'nothing'"),
        (["--backend", "opencl"], "--backend must be among eager, native"),
        (["--shape", "3,4"], "--shape must come with one --op"),
        (["--op", "dropout", "--shape", "3,4,5"], "--shape must be positive sizes rows,cols"),
        (["--case", "nothing"], "must leave at least one case"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    assert __main__.main(["run", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_malloc_is_set_once_for_runs(monkeypatch: pytest.MonkeyPatch):
    started: list[dict] = []
    monkeypatch.setattr(__main__.os, "execve", lambda path, argv, env: started.append(env))
    for name in __main__.MALLOC:
        monkeypatch.delenv(name, raising=False)
    __main__.keep_memory(["run"])
    assert started[0]["MALLOC_MMAP_THRESHOLD_"] == "4294967296", "glibc keeps its blocks"
    __main__.keep_memory(["run", "--default-malloc"])
    __main__.keep_memory(["list"])
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    __main__.keep_memory(["run"])
    assert len(started) == 1, "only a run, only once, and not when told otherwise"


@pytest.mark.parametrize("preset", case.PRESETS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_complete(preset: str, device: str):
    planned = jobs(CASES, Options(device=device, preset=preset))
    assert {job.case.op for job in planned} == set(CASES), "every op has shapes"
    for job in planned:
        assert len(job.shape) == len(job.case.letters.split(",")), f"{job.identifier}: sizes {job.case.letters}"
        if len(job.case.passes) == 1:
            continue
        forward, both = (job.case.cost(job.shape, 2, backward) for backward in (False, True))
        assert both.read > forward.read, f"{job.identifier}: backward reads more"
        more = 3 if "weight" in job.case.differentiable else 2  # a frozen weight saves most of one product
        assert more * forward.flops <= both.flops <= 3 * forward.flops, f"{job.identifier}: two more products"


def test_report_without_matplotlib_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(BenchError, match="pip install matplotlib"), nullcontext():
        report._matplotlib()
