"""The helpers that other tests lean on: each must fail on what it is there to catch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from randfuse import testing
from randfuse.reference import streams

STREAMS = Path(__file__).parent / "kat" / "streams.txt"


def test_tolerance_calibrates_itself():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    plain = exact.to(torch.bfloat16)
    testing.assert_close_to_float64(plain, exact, plain)
    wrong = plain.clone()
    wrong[7] = 3
    with pytest.raises(AssertionError, match=r"y: max error .* 2 times PyTorch's own .* worst at \(7,\): got 3"):
        testing.assert_close_to_float64(wrong, exact, plain, name="y")
    with pytest.raises(AssertionError, match="max error"):  # what bfloat16 may be off by, float32 may not
        testing.assert_close_to_float64(plain.float(), exact, exact.float())


def test_tolerance_at_places_that_are_not_finite():
    exact = torch.tensor([1.0, float("inf"), float("nan")], dtype=torch.float64)
    testing.assert_close_to_float64(exact.float(), exact, exact.float())
    for wrong in ([1.0, -float("inf"), float("nan")], [1.0, float("inf"), 0.0], [1.0, 5.0, float("nan")]):
        with pytest.raises(AssertionError, match="places differ"):
            testing.assert_close_to_float64(torch.tensor(wrong), exact, exact.float())
    with pytest.raises(AssertionError, match="max error"):
        testing.assert_close_to_float64(torch.full((3,), float("nan")), torch.ones(3).double(), torch.ones(3))


def test_tolerance_refuses_another_shape_or_dtype():
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"shape \(1,\) must be that of float64_reference \(3,\)"):
        testing.assert_close_to_float64(torch.ones(1), exact, exact.float())
    with pytest.raises(AssertionError, match=r"dtype torch.float16 must be torch.float32"):
        testing.assert_close_to_float64(torch.ones(3).half(), exact, exact.float())
    empty = torch.empty(0, 4)
    testing.assert_close_to_float64(empty, empty.double(), empty)


def test_bitwise_equality_names_the_first_difference():
    a = torch.zeros(2, 3)
    testing.assert_bitwise_equal(a, a.clone())
    with pytest.raises(AssertionError, match=r"2 of 6 places differ, the first at \(0, 2\): got 0\.0, expected 4\.0"):
        testing.assert_bitwise_equal(a, torch.tensor([[0.0, 0.0, 4.0], [0.0, 5.0, 0.0]]))
    with pytest.raises(AssertionError, match="1 of 1 places differ"):  # equal as numbers, not as bits
        testing.assert_bitwise_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    testing.assert_bitwise_equal(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError, match="dtype must be"):
        testing.assert_bitwise_equal(a, a.bool())


def test_known_answers_are_read_as_numbers():
    answers = testing.known_answers(STREAMS)
    assert {a.kind for a in answers} == set(testing._COLUMNS), "a kind is missing"
    for _, (op, width), (word,) in (a for a in answers if a.kind == "domain"):
        assert streams.domain_word(op, width) == word, f"domain {op}, {width}: {streams.domain_word(op, width):x}"
    lanes = next(a for a in answers if a.kind == "lanes")
    assert lanes.arguments[1:] == (1, 16, 7, 3, 40, 9), "decimal columns"
    assert lanes.answers[0] == 0xFDD9, "hexadecimal columns"
    assert len(lanes.answers) == 9, "as many values as the line has"


@pytest.mark.parametrize(("line", "message"), [("philax 7 0", "must begin with one of"), ("domain 1 16", "3 fields")])
def test_known_answers_refuse_a_bad_line(tmp_path: Path, line: str, message: str):
    path = tmp_path / "bad.txt"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        testing.known_answers(path)


def guard(monkeypatch: pytest.MonkeyPatch, *survives: bool) -> str | None:
    results = iter(survives)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")  # so that the variable is restored after the test
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(testing, "_lists_amx", lambda: True)
    monkeypatch.setattr(testing, "_bf16_product_survives", lambda: next(results))
    return testing.guard_onednn()


def test_guard_sets_the_variable_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    assert "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 is set" in str(guard(monkeypatch, False, True)), "what was done"
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == testing.SAFE_ISA, "the variable must be set"
    assert "faults on it" in capsys.readouterr().err, "it must be said"
    assert testing.guard_onednn() is None, "a variable that is set is left alone"


def test_guard_leaves_a_sound_machine_alone(monkeypatch: pytest.MonkeyPatch):
    assert guard(monkeypatch, True) is None, "nothing to say"
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ, "nothing to set"


def test_guard_refuses_to_be_too_late(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match="before torch's first matrix product"):
        guard(monkeypatch, False, False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_child_is_seen(monkeypatch: pytest.MonkeyPatch):
    assert testing._bf16_product_survives(), "this process runs under a setting that works"
    monkeypatch.setattr(torch, "mm", lambda a, b: os.kill(os.getpid(), signal.SIGILL))
    assert not testing._bf16_product_survives(), "a child that died must be noticed"
