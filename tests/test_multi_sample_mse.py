"""multi_sample_mse: equality with F.mse_loss over a loop of masks, derivatives, errors."""

from __future__ import annotations

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse.testing import assert_close_to_float64


def plain(x, weight, target, bias, kept, reduction):
    scale = 1 / (1 - randfuse.effective_p(0.3))
    losses = [
        F.mse_loss(F.linear(torch.where(m, x * scale, 0), weight, bias), target, reduction=reduction) for m in kept
    ]
    return torch.stack(losses).mean(0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_loop(device, dtype, reduction):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    operands, key = (make(6, 2, 40), make(3, 40), make(6, 2, 3), make(3)), randfuse.key(4, device)
    kept = [randfuse.dropout_mask((12, 40), 0.3, key=key, sample=m).reshape(6, 2, 40) for m in range(4)]

    def loss_and_gradients(function, cast):
        leaves = [cast(t.detach()).requires_grad_() for t in operands]
        loss = function(*leaves)
        return loss, *torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    def ours(x, weight, target, bias):
        return randfuse.multi_sample_mse(x, weight, target, bias, 0.3, 4, reduction=reduction, key=key)

    expected = lambda *o: plain(*o, kept, reduction)  # noqa: E731
    got = loss_and_gradients(ours, torch.clone)
    exact, same = (loss_and_gradients(expected, cast) for cast in (torch.Tensor.double, torch.clone))
    for name, a, e, s in zip(("loss", "dx", "dw", "dt", "db"), got, exact, same, strict=True):
        assert_close_to_float64(a, e, s, name=name, tiny=4 * torch.finfo(dtype).eps)


def test_gradcheck_to_second_order(device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (2, 5), (3, 2))]
    run = lambda *o: randfuse.multi_sample_mse(*o, p=0.4, num_samples=2, key=randfuse.key(1))  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_autocast_returns_float32(device):
    x, weight, target = torch.randn(4, 5, device=device), torch.randn(2, 5, device=device), torch.ones(4, 2).to(device)
    with torch.autocast(device, torch.bfloat16):
        assert randfuse.multi_sample_mse(x, weight, target).dtype == torch.float32


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"target": torch.ones(4)}, ValueError, r"target must have shape \(…, C\) = \(4, 2\), got \(4,\)"),
    ({"target": torch.ones(4, 2).long()}, TypeError, "target must be float32"),
    ({"reduction": "max"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'max'"),
    ({"weight": torch.ones(2, 2, 5)}, ValueError, r"weight must have shape \(N, K=5\)"),
    ({"num_samples": 0}, ValueError, "num_samples must be in .*, got 0"),
    ({"p": 2}, ValueError, r"p must be in \[0, 1\], got 2"),
])  # fmt: skip
def test_errors(kwargs, error, message):
    given = {"x": torch.ones(4, 5), "weight": torch.ones(2, 5), "target": torch.ones(4, 2)} | kwargs
    with pytest.raises(error, match=f"^multi_sample_mse: {message}"):
        randfuse.multi_sample_mse(**given)
