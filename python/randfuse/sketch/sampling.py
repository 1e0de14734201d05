"""Sampling rows by importance: water-filled probabilities, three ways to draw, and what to do with the draw.

Probabilities are multiples of 2⁻³², whose sum is k exactly, and draws compare and add these integers: samples of fixed
size have exactly k rows, marginals are exact, and a draw is the same on every machine that has the same probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.random_words import random_words
from ..reference import streams
from . import _checks
from .operator import Operator

ONE = 2**32
COIN, START, ORDER, DUEL = 0, 1, 2, 3  # roles of domain 20; a duel at level l of the tree has role DUEL + l


class RowSample(Operator):
    """Rows `indices` of the identity, each divided by √probability: S @ A keeps rows of A, and E[SᵀS] = I.

    `sample_rows` makes it. Weighted sums want 1/p instead: ``A[S.indices] / S.probabilities[:, None]``.

    Attributes:
        indices: (d,) int64, ascending.
        probabilities: (d,) float64, with which these rows were drawn.
    """

    keyed = False  # the weights too make it what it is

    def __init__(self, indices: Tensor, probabilities: Tensor, m: int, key: Tensor) -> None:
        self.name, self.key = "RowSample", key  # not Operator's: independent draws may have no row at all
        self.indices, self.probabilities = indices, probabilities
        self.d, self.m = len(indices), m
        self.rows, self.cols = (0, self.d), (0, m)

    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row of the block, its column in the block and its factor, for the kept rows that lie in the block."""
        indices = self.indices[slice(*self.rows)]
        row = ((indices >= self.cols[0]) & (indices < self.cols[1])).nonzero().squeeze(1)
        return row, indices[row] - self.cols[0], self.probabilities[slice(*self.rows)][row].rsqrt().unsqueeze(1)

    def _sketch(self, a: Tensor, key: Tensor) -> Tensor:
        row, column, factor = self._places()
        dtype = streams.sum_dtype(a)
        kept = a[column].to(dtype) * factor.to(dtype)
        return kept.new_zeros(self.shape[0], a.shape[1]).index_copy(0, row, kept).unsqueeze(0)

    def _adjoint(self, y: Tensor, key: Tensor) -> Tensor:
        row, column, factor = self._places()
        dtype = streams.sum_dtype(y)
        kept = y[0, row].to(dtype) * factor.to(dtype)
        return kept.new_zeros(self.shape[1], y.shape[2]).index_copy(0, column, kept)

    def to_dense(self) -> Tensor:
        row, column, factor = self._places()
        dense = torch.zeros(self.shape, device=self.key.device)
        dense[row, column] = factor.squeeze(1).float()
        return dense


def inclusion_probabilities(weights: Tensor, k: int) -> Tensor:
    """pᵢ = min(1, c·wᵢ) with Σp = k, "water-filled": (m,) float64, multiples of 2⁻³², positive where the weight is.

    They minimise Σ wᵢ²/pᵢ, the second moment of a sum estimated from k of its terms.

    >>> inclusion_probabilities(torch.tensor([8.0, 1.0, 1.0, 0.0]), 2)
    tensor([1.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    return _units("inclusion_probabilities", weights, k).double() / ONE


def sample_rows(
    weights: Tensor,
    k: int,
    *,
    method: str = "pivotal",
    order: str | Tensor = "random",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RowSample:
    """Draw k of m rows, row i with probability pᵢ = min(1, c·wᵢ) -> an operator S that keeps them, E[SᵀS] = I.

    "independent" (Poisson) tosses a coin for each row, so that k is only the mean of the size. "systematic" takes the
    rows at which the running sum of p passes u, u + 1, … for one random u. "pivotal" lets rows duel in a tree, each
    duel deciding one of two: exactly k rows, and no two rows are drawn together more often than independent ones.
    Both fixed-size methods spread the sample along `order`. In the order of the data, systematic sampling meets
    periodic data with all or nothing (100 times the variance has been seen); in random order it does not.

    Args:
        weights: (m,) non-negative and finite: leverage scores, sensitivities, norms.
        k: expected or exact size, at most the number of positive weights.
        method: "independent", "systematic" or "pivotal".
        order: "random", "given", or a permutation (m,) along which neighbours shall be rivals.
        key, generator: see `randfuse.key`.

    Deville, Tillé, "Unequal probability sampling without replacement through a splitting method", Biometrika 1998;
    Shimizu et al., "Improved active learning via dependent leverage score sampling", ICLR 2024.

    >>> S = sample_rows(torch.rand(1000), 50, key=randfuse.key(0))
    >>> A = torch.randn(1000, 3)
    >>> (S @ A).shape, len(S.indices), S.probabilities.shape
    (torch.Size([50, 3]), 50, torch.Size([50]))
    """
    op = "sample_rows"
    _checks.choice(op, "method", method, tuple(DRAWS))
    units = _units(op, weights, k)
    key = _checks.key_for(op, key, generator, units.device).reshape(1)
    if method == "independent":
        if order != "random":
            raise ValueError(f"{op}: order must be left out when method is 'independent', got {order!r}")
        indices = _independent(units, key).nonzero().squeeze(1)
    else:
        indices = _in_order(units, _order(op, order, key, len(units)), key, method, k)
    return RowSample(indices, units[indices].double() / ONE, len(units), key.reshape(()))


def approx_matmul(
    a: Tensor,
    b: Tensor,
    k: int,
    *,
    method: str = "pivotal",
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """a @ b for a (n, m), b (m, p) from k of the m columns of a and rows of b: an unbiased estimate.

    Row i is drawn with probability pᵢ ∝ ‖aᵢ‖‖bᵢ‖, at most 1; drawn independently, E‖error‖² is
    Σ(1/pᵢ − 1)‖aᵢ‖²‖bᵢ‖², and no other p gives less. Arguments as in `sample_rows`; differentiable,
    the draw being a constant.

    Drineas, Kannan, Mahoney, "Fast Monte Carlo algorithms for matrices I", SIAM J. Computing 2006.

    >>> a, b = torch.randn(4, 500), torch.randn(500, 3)
    >>> approx_matmul(a, b, 100, key=randfuse.key(0)).shape
    torch.Size([4, 3])
    """
    op = "approx_matmul"
    a, b = _checks.matrix(op, "a", a), _checks.matrix(op, "b", b, rows=a.shape[-1])
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(f"{op}: b must be {a.dtype} on {a.device}, got {b.dtype} on {b.device}")
    weights = (a.detach().double().norm(dim=0) * b.detach().double().norm(dim=1)).clamp(min=1e-300)
    s = sample_rows(weights, k, method=method, key=key, generator=generator)
    return (a[:, s.indices] / s.probabilities.to(a.dtype)) @ b[s.indices]


def _units(op: str, weights: Tensor, k: int) -> Tensor:
    """Probabilities in units of 2⁻³², int64, with the sum k·2³²."""
    _checks.float_tensor(op, "weights", weights)
    if weights.dim() != 1 or len(weights) == 0:
        raise ValueError(f"{op}: weights must have shape (m,) with elements, got {tuple(weights.shape)}")
    w = _checks.finite(op, "weights", weights).detach().double()
    if (w < 0).any():
        raise ValueError(f"{op}: weights must be non-negative, got {float(w.min())}")
    positive = int((w > 0).sum())
    if positive == 0:
        raise ValueError(f"{op}: weights must have a positive element, got zeros alone")
    _checks.whole(op, "k", k, 1, min(positive, 2**30))
    return _fill_units(w, k)


def _fill_units(w: Tensor, k: int) -> Tensor:
    """`water_fill` in units; no value is read by the host."""
    units = (water_fill(w, k) * ONE).round().long().clamp(max=ONE)
    units = torch.where(w > 0, units.clamp(min=1), 0)
    # Rounding leaves the sum off by at most one unit a row, which all share by their room; what is left of the division
    # goes by ones to the first rows that have room for it.
    excess = units.sum() - k * ONE
    room = torch.where(w > 0, torch.where(excess > 0, units - 1, ONE - units), 0)
    taken = excess.abs() * room // room.sum().clamp(min=1)
    able = room > taken
    taken = taken + (able & (able.cumsum(0) <= excess.abs() - taken.sum()))
    return torch.where(excess > 0, units - taken, units + taken)


def water_fill(w: Tensor, k: int) -> Tensor:
    """min(1, c·w) with the sum k, for w (m,) ≥ 0 of which at least k are positive; no value is read by the host."""
    falling, place = w.topk(k)  # no other can be at 1
    rest = w.index_fill(0, place, 0.0).sum() + falling.flip(0).cumsum(0).flip(0)  # of this one and all smaller ones
    full = torch.arange(k, device=w.device)  # if so many are at 1, the others share k − full
    c = torch.where(rest > 0, (k - full) / rest, 0.0)
    first = (c * falling <= 1).to(torch.uint8).argmax().reshape(1)
    c = c.gather(0, first)  # c[first] would break a graph
    return (c * w).index_copy(0, place, torch.where(full < first, 1.0, c * falling)).clamp(0, 1)


def draw_positive(weights: Tensor, k: int, method: str, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rows drawn along a random order, and the probabilities (m,) of all, for the inside of a backward pass: nothing is
    checked or read by the host, and every row has a chance, if a small one, so that k rows there are."""
    w = weights.nan_to_num(nan=0.0, posinf=0.0)
    w = w + torch.where(w.max() > 0, 1e-9 * w.max(), 1.0)
    units, key = _fill_units(w, k), key.reshape(1)
    if method == "independent":
        rows = _independent(units, key).nonzero().squeeze(1)
    else:
        rows = _in_order(units, _order("", "random", key, len(units)), key, method, k)
    return rows, units.double() / ONE


def _in_order(units: Tensor, place: Tensor, key: Tensor, method: str, k: int) -> Tensor:
    """The k rows that a method of fixed size draws along the order `place`, ascending."""
    drawn = torch.zeros_like(units, dtype=torch.bool).index_copy(0, place, DRAWS[method](units[place], key))
    return torch.nonzero_static(drawn, size=k).squeeze(1)


def _words(key: Tensor, role: int, row: Tensor) -> Tensor:
    """The first 64 bits of the block of each row (m,), for keys (…, 1) -> (…, m)."""
    sample = torch.full((), role, device=row.device)
    return random_words(key, row, sample, streams.domain_word(streams.ROW_SAMPLING, 64))[0]


def _order(op: str, order: str | Tensor, key: Tensor, m: int) -> Tensor:
    if isinstance(order, Tensor):
        if order.dtype != torch.int64 or order.shape != (m,) or order.device != key.device:
            raise ValueError(
                f"{op}: order must be an int64 permutation ({m},) on {key.device}, got {order.dtype} "
                f"{tuple(order.shape)} on {order.device}"
            )
        if not torch.equal(order.sort().values, torch.arange(m, device=key.device)):
            raise ValueError(f"{op}: order must hold each of 0 … {m - 1} once, got another")
        return order
    _checks.choice(op, "order", order, ("random", "given"))
    row = torch.arange(m, device=key.device)
    return row if order == "given" else _words(key, ORDER, row).sort(stable=True).indices


# The draws work on units (m,), already in order, under keys (…, 1), and return (…, m) bool.


def _independent(units: Tensor, key: Tensor) -> Tensor:
    return (_words(key, COIN, torch.arange(len(units), device=units.device)) >> 32 & (ONE - 1)) < units


def _systematic(units: Tensor, key: Tensor) -> Tensor:
    """Whether one of u, u + 1, … lies in [c − p, c), c being the running sum of p."""
    u = _words(key, START, torch.zeros(1, dtype=torch.int64, device=key.device)) >> 32 & (ONE - 1)
    last = units.cumsum(0) - 1 - u
    return last >> 32 != (last - units) >> 32


def _pivotal(units: Tensor, key: Tensor) -> Tensor:
    """Rivals with a and b units meet. If a + b ≤ 1 one is out and the other goes on with a + b, else one is drawn and
    the other goes on with a + b − 1: who, by a coin that keeps both means. Neighbours meet first, then who is left.

    The coin is 53 bits, and is compared in float64 with integers below 2³⁴: all but one product is exact.
    """
    m = len(units)
    unit = torch.arange(m, device=units.device).expand(*key.shape[:-1], m)
    p, drawn = units.expand(unit.shape), torch.zeros(*key.shape[:-1], m + 1, dtype=torch.bool, device=units.device)
    for level in range((m - 1).bit_length()):
        pairs = unit.shape[-1] // 2
        (left, right), (a, b) = (x[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1) for x in (unit, p))
        coin = (_words(key, DUEL + level, torch.arange(pairs, device=units.device)) >> 11 & (2**53 - 1)) * 2.0**-53
        both = a + b
        heavy = both > ONE
        # a + b ≤ 1: the right one goes on with probability b / (a + b); else with (1 − b) / (2 − a − b)
        right_on = coin * torch.where(heavy, 2 * ONE - both, both) < torch.where(heavy, ONE - b, b)
        out = torch.where(right_on, left, right)
        drawn.scatter_(-1, torch.where(heavy, out, m), True)  # place m is nobody's
        unit = torch.cat((torch.where(right_on, right, left), unit[..., 2 * pairs :]), -1)
        p = torch.cat((torch.where(heavy, both - ONE, both), p[..., 2 * pairs :]), -1)
    return drawn.scatter(-1, unit, drawn.gather(-1, unit) | (p == ONE))[..., :m]


DRAWS = {"independent": _independent, "systematic": _systematic, "pivotal": _pivotal}
