"""`python -m randfuse.info` names every backend, and the reason where one is missing."""

from __future__ import annotations

import json

import pytest
from randfuse import _backends, _extension, _table, info


def test_text_names_backends_and_table(capsys: pytest.CaptureFixture):
    info.main([])
    text = capsys.readouterr().out
    backends = text[text.index("\nbackends\n") :].splitlines()
    for backend in _backends.BACKENDS[1:]:
        line = next(line for line in backends if line.startswith(f"  {backend} "))
        reason = _backends.unavailable(backend)
        assert line.endswith(reason or "available"), f"{backend}: {line!r} must say {reason or 'available'!r}"
    for _, _, _, evidence in _table.TABLE:
        assert evidence in text, f"the evidence {evidence!r} must be printed"


def test_json_is_complete(capsys: pytest.CaptureFixture):
    info.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) == {"reference", "cpu", "cuda", "triton"}, "all backends"
    assert found["versions"]["torch"], "torch's version"
    assert found["cpu"]["threads"] >= 1, "CPU features"
    assert len(found["dispatch"]) == len(_table.TABLE), "one object an entry"
    assert all(e["where"] and e["evidence"] for e in found["dispatch"]), "condition and evidence of each"


def test_a_missing_extension_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(_extension, "problem", "the C++ extension is not built; run this")
    info.main([])
    assert capsys.readouterr().out.count("not built; run this") == 3, "extension, cpu and cuda all name the reason"


def test_conditions_are_shown_as_written():
    entries = (("op", lambda a: a[0] > 2 and "x" in a, "cuda", "measured"),)
    assert info._condition(entries[0][1]) == 'a[0] > 2 and "x" in a', "the source of the condition"
