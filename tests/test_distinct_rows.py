"""distinct_rows: the reference's numbers, no repetition, every choice equally likely."""

from __future__ import annotations

import pytest
import randfuse
import torch
from randfuse import _extension, use_backend
from randfuse.ops.distinct_rows import distinct_rows
from randfuse.testing import assert_bitwise_equal

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))


@pytest.mark.parametrize(("population", "count"), [(0, 0), (5, 0), (1, 1), (7, 7), (1000, 300), (2**32 - 1, 500)])
def test_are_the_reference_s_and_differ(population, count):
    keys = torch.tensor([3, -(2**62)])
    rows = distinct_rows(keys, 1, population, count)
    with use_backend("reference"):
        assert_bitwise_equal(rows, distinct_rows(keys, 1, population, count))
    assert all(len(set(line.tolist())) == count for line in rows)
    assert ((rows >= 0) & (rows < max(population, 1))).all()


def test_every_ordered_choice_is_equally_likely():
    """χ² over the 60 ordered choices of 3 from 5, 30000 keys; 59 degrees of freedom, beyond 126 once in 10⁶."""
    rows = distinct_rows(randfuse.split(randfuse.key(1), 30000), 0, 5, 3)
    counts = torch.bincount(rows @ torch.tensor([25, 5, 1])).double()
    counts = counts[counts > 0]
    assert len(counts) == 60
    chi2 = float(((counts - 500) ** 2 / 500).sum())
    assert chi2 < 126, f"χ² = {chi2:.0f}"
    # Negative control: reading the same 64 bits in every step repeats choices.
    same = (rows[:, :1] + torch.arange(3)) % 5
    counts = torch.bincount(same @ torch.tensor([25, 5, 1]), minlength=125).double()
    assert float((counts[counts > 0] - 500).square().sum() / 500) > 126
