"""Every example in a docstring or in the README runs, and every public function is documented as the house wants it."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import randfuse
import torch

README = Path(__file__).parent.parent / "README.md"
MODULES = [
    importlib.import_module(m.name)
    for package in (randfuse.masked_diffusion, randfuse.ops, randfuse.nn, randfuse.sketch)
    for m in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
    if "._" not in m.name
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_docstring_examples(module):
    results = doctest.testmod(module, extraglobs={"randfuse": randfuse, "torch": torch})
    assert results.attempted > 0, f"{module.__name__} must show an example"
    assert results.failed == 0


@pytest.mark.parametrize("name", [n for n in randfuse.__all__ if callable(getattr(randfuse, n))])
def test_public_docstrings(name):
    text = getattr(randfuse, name).__doc__ or ""
    assert text.strip(), f"{name} must have a docstring"
    if name in randfuse.ops.__all__:
        for part in ("Equivalent to: ``", "Args:", "Raises:", ">>> "):
            assert part in text, f"{name}: the docstring must have {part!r}"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


@pytest.mark.parametrize("index", range(len(snippets())))
def test_readme_snippets(index):
    exec(snippets()[index], {})


def test_readme_has_three_snippets_each_with_its_plain_equivalent():
    assert len(snippets()) >= 3
    assert all("# plain PyTorch" in s for s in snippets()[:3])
