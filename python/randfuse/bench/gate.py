"""The correctness gate: a variant that computes something else gets no number.

Every variant runs forward and backward once. The decisions it took are read off the result in which dropped elements
are zero; randfuse's must be the reference's, element by element, those of another sampler must have the right rate.
The outputs and gradients must then be what the formula in float64 gives *for those decisions*, so one gate serves all
variants, whatever their random numbers. randfuse is held to the house tolerance (`randfuse.testing`); of the others it
is only asked whether they compute the same thing. Where no result shows the decisions (several masks are summed),
randfuse's result must be that of the reference's decisions, and others are asked for finite results only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..testing import assert_bitwise_equal, assert_close_to_float64
from .case import AnyCase, Case, Forward, Inputs, SamplerCase, Shape

# torch.compile sums a bias gradient in plain float32, which costs up to ten times the error of PyTorch's cascade.
BASELINE_FACTOR = 64.0


class GateError(AssertionError):
    """A variant is wrong; the message says where."""


def admit(case: AnyCase, shape: Shape, forward: Forward, inputs: Inputs, key: Tensor | None, floor: bool) -> None:
    """Raise GateError unless `forward` does the op; `key` is what randfuse's own variants draw from."""
    if isinstance(case, Case):
        check(case, forward, inputs, expected=None if key is None else case.mask(shape, key), floor=floor)
    elif isinstance(case, SamplerCase) and not floor:  # the floor draws nothing
        check_tokens(case, forward, inputs, expected=None if key is None else case.tokens(inputs, key))


def gradients(case: Case, forward: Forward, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one forward and backward."""
    leaves = {n: t.detach().requires_grad_(n in case.differentiable) for n, t in inputs.items()}
    out = forward(leaves)
    found = torch.autograd.grad(out, [leaves[n] for n in case.differentiable], inputs["grad"].to(out.dtype))
    return out.detach(), dict(zip(case.differentiable, found, strict=True))


def check(case: Case, forward: Forward, inputs: Inputs, *, expected: Tensor | None, floor: bool) -> None:
    """Raise GateError unless `forward` does the op; `expected` is the mask that randfuse must have used."""
    try:
        out, grads = gradients(case, forward, inputs)
        view = case.dropped_view(out, grads)
        if view is None:
            if expected is None and not floor:
                return _assert_sane(case, inputs, out, grads)
            kept = torch.ones((), device=out.device) if expected is None else expected
        else:
            kept = view != 0
            if expected is not None:
                assert_bitwise_equal(kept, expected, name="decisions (True = kept)")
            elif not floor:
                _assert_rate(kept, case.p)
        scale = 1.0 if floor else case.scale(exactly=expected is not None)
        factor = kept.double() * scale
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        exact, exact_grads = gradients(case, lambda i: case.exact(i, factor), wide)
        same, same_grads = gradients(case, lambda i: case.exact(i, factor), inputs)
        tolerance = 2.0 if expected is not None else BASELINE_FACTOR
        assert_close_to_float64(out, exact, same, name="output", factor=tolerance)
        for name, grad in grads.items():
            title = f"gradient of {name}"
            assert_close_to_float64(grad, exact_grads[name], same_grads[name], name=title, factor=tolerance)
    except AssertionError as error:
        raise GateError(str(error)) from error


def _assert_sane(case: Case, inputs: Inputs, out: Tensor, grads: dict[str, Tensor]) -> None:
    """All that can be asked of another sampler whose decisions no result shows: the shapes of a finite result."""
    for name, value in {"output": out, **grads}.items():
        like = inputs.get(name, inputs["grad"])
        assert value.shape == like.shape, f"{name}: shape {tuple(value.shape)} must be {tuple(like.shape)}"
        assert value.isfinite().all(), f"{name}: must be finite"


def check_tokens(case: SamplerCase, forward: Forward, inputs: Inputs, *, expected: Tensor | None) -> None:
    """Raise GateError unless `forward` yields `expected`, or, being another sampler, an allowed token for every row.

    Others may leave places after the last token undefined, and yield with the tokens how many of a row count.
    """
    try:
        logits = case.logits(inputs)
        out = forward(inputs)
        if isinstance(out, tuple):
            tokens, counts = out
            out = tokens.where(torch.arange(tokens.shape[1], device=tokens.device) < counts.unsqueeze(-1), -1)
        out = out.reshape(logits.shape[:-1])
        if expected is not None:
            assert_bitwise_equal(out, expected, name="tokens")
        emitted = out >= 0  # places after the last token hold -1
        of_tokens = logits.gather(-1, out.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
        assert emitted.reshape(len(out), -1)[:, 0].all(), "a row must have a token"
        assert (of_tokens[emitted] > -torch.inf).all(), "a token of no probability was drawn"
    except AssertionError as error:
        raise GateError(str(error)) from error


def _assert_rate(kept: Tensor, p: float) -> None:
    """Six standard errors: a false alarm in 5·10⁸ checks."""
    n = kept.numel()
    dropped = n - int(kept.sum())
    slack = 6 * (n * p * (1 - p)) ** 0.5 + 1
    assert abs(dropped - n * p) <= slack, f"dropped {dropped} of {n}, expected {n * p:.0f} within {slack:.0f}"
