"""dropout_linear(granularity="block"): equality with a masked product, the law, derivatives, errors."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _backends, _extension, use_backend
from randfuse._backends import call
from randfuse.ops import kept_blocks
from randfuse.reference.block_dropout_linear import ROWS, keep_mask
from randfuse.reference.kept_blocks import BLOCKS
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64

needs_extension = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (M, K, N, block): single element, ragged blocks and rows, several row blocks and panels of output, empty.
SHAPES = [(1, 1, 1, 32), (3, 70, 5, 32), (2 * ROWS + 9, 200, 33, 64), (40, 300, 700, 128)]
EMPTY = [(0, 40, 3, 32), (5, 0, 3, 32), (5, 40, 0, 32)]


@pytest.fixture
def device(device):
    if _backends._forced == "cuda":
        pytest.skip("no CUDA kernel, by design")
    return device


def operands(m, k, n, dtype, device):
    make = lambda *s: torch.randn(s, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    return make(m, k), make(n, k), make(n), make(m, n)


def run(x, weight, bias=None, p=0.5, **kwargs):
    return randfuse.dropout_linear(x, weight, bias, p, granularity="block", **kwargs)


def plain(x, weight, bias, factor, grad):
    """What PyTorch makes of it in the dtype of x, given the factor of each element: y, dx, dw, db."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    wide = x if x.dtype == torch.float64 else x.float()
    y = F.linear((wide * factor.to(wide.dtype)).to(x.dtype), weight, bias)
    return y, *torch.autograd.grad(y, (x, weight, bias), grad)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_forward_and_gradients(device, shape, dtype, p):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    *sizes, block = shape
    x, weight, bias, grad = operands(*sizes, dtype, device)
    key = randfuse.key(7, device)
    blocks = -(-x.shape[1] // block)
    kept, coin, scale = kept_blocks.choice(p, blocks)
    chosen = kept_blocks.draw(key, -(-x.shape[0] // ROWS), blocks, kept, coin, BLOCKS)
    factor = keep_mask(chosen, *x.shape, block)[0].double() * scale
    for t in (x, weight, bias):
        t.requires_grad_()
    y = run(x, weight, bias, p, block_size=block, key=key)
    got = y, *torch.autograd.grad(y, (x, weight, bias), grad)
    exact = plain(x.double(), weight.double(), bias.double(), factor, grad.double())
    same = plain(x, weight, bias, factor, grad)
    tiny = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    for name, a, e, s in zip(("y", "dx", "dw", "db"), got, exact, same, strict=True):
        assert_close_to_float64(a, e, s, name=name, tiny=tiny)
        assert a.is_contiguous(), name
    assert torch.equal(got[1] != 0, (factor != 0) & (got[1] != 0)), "the gradient is zero where x was dropped"


def decisions(p, key, shape=(2 * ROWS, 256), block=32):
    """The mask itself, shown by an identity weight."""
    return run(torch.ones(shape), torch.eye(shape[1]), p=p, key=key, block_size=block)


def test_each_row_block_keeps_its_own_blocks(device):
    y = decisions(0.5, randfuse.key(3, device)).reshape(2, ROWS, 8, 32)
    assert torch.equal(y, y[:, :1, :, :1].expand_as(y)), "a block is kept or dropped as a whole"
    assert (y[:, 0, :, 0] != 0).sum(-1).tolist() == [4, 4], "exactly half of the blocks"
    assert not torch.equal(y[0], y[1])
    assert set(y.flatten().tolist()) == {0.0, 2.0}


def outputs(y, p):
    """Sums over the kept of y (n,), scaled, one for each of many keys."""
    kept, coin, scale = kept_blocks.choice(p, len(y))
    chosen = kept_blocks.draw(torch.arange(40_000), 1, len(y), kept, coin, BLOCKS)[:, 0]
    return scale * torch.cat((y, torch.zeros(1, dtype=y.dtype)))[chosen].sum(-1)


@pytest.mark.parametrize(("n", "p"), [(6, 1 / 3), (8, 0.5), (16, 0.875)])
def test_mean_and_variance_at_fixed_k(device, n, p):
    """p/(1-p) · n/(n-1) · [Σy² − (Σy)²/n], in 40000 draws: within 5 standard errors, 10⁻⁶ to fail by chance.

    Negative control: independent blocks would have p/(1-p)·Σy², which must lie outside of that.
    """
    y = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    out = outputs(y, p)
    variance = p / (1 - p) * n / (n - 1) * float((y**2).sum() - y.sum() ** 2 / n)
    centred = out - y.sum()
    assert abs(float(centred.mean())) < 5 * (variance / len(out)) ** 0.5
    error = 5 * float((centred**4).mean() - variance**2) ** 0.5 / len(out) ** 0.5
    assert abs(float((centred**2).mean()) - variance) < error
    assert abs(p / (1 - p) * float((y**2).sum()) - variance) > error, "the test must tell independent blocks apart"


def test_mean_is_exact_where_k_is_drawn(device):
    """p = 0.1 of 6 blocks: rounding k to 5 and scaling by 1/(1-p) would give 0.926 of the mean, 40 errors off."""
    y = torch.ones(6, dtype=torch.float64)
    out = outputs(y, 0.1)
    error = float(out.std()) / len(out) ** 0.5
    assert abs(float(out.mean()) - 6) < 5 * error
    assert abs(6 * 5 / 6 / 0.9 - 6) > 40 * error, "negative control"


def test_keys_slices_and_leading_dims(device):
    x, weight = torch.randn(2, ROWS, 300, device=device), torch.randn(7, 300, device=device)
    key = randfuse.key(5, device)
    whole = run(x, weight, key=key, block_size=32)
    assert whole.shape == (2, ROWS, 7)
    part = run(x[1], weight, key=key, block_size=32, row_offset=ROWS)
    torch.testing.assert_close(part, whole[1], rtol=1e-4, atol=1e-4)
    keys = randfuse.split(key, 4)  # of two runs of rows in each element of x
    parts = run(x, weight, key=keys, block_size=32).reshape(4, -1, 7)
    for g in range(4):
        own = x.reshape(4, -1, 300)[g]
        torch.testing.assert_close(parts[g], run(own, weight, key=keys[g], block_size=32), rtol=1e-4, atol=1e-4)
    assert run(x[0, 0], weight, key=key, block_size=32).shape == (7,)


def test_any_strides(device):
    x, weight, key = (
        torch.randn(100, 300, device=device).t(),
        torch.randn(100, 40, device=device),
        randfuse.key(4, device),
    )
    got, expected = run(x, weight.t(), key=key), run(x.contiguous(), weight.t().contiguous(), key=key)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_dropped_nan_and_inf_do_not_spread(device):
    key = randfuse.key(2, device)
    mask = decisions(0.5, key) != 0
    x = torch.randn(mask.shape, device=device)
    poisoned = torch.where(mask, x, torch.where(x > 0, math.nan, math.inf)).requires_grad_()
    weight = torch.randn(9, mask.shape[1], device=device, requires_grad=True)
    y = run(poisoned, weight, key=key, block_size=32)
    dx, dw = torch.autograd.grad(y.sum(), (poisoned, weight))
    assert_bitwise_equal(y, run(x, weight, key=key, block_size=32))
    assert dx.isfinite().all()
    assert dw.isfinite().all()


def test_p_zero_is_linear(device):
    x, weight, bias, _ = operands(4, 70, 3, torch.float32, device)
    assert_bitwise_equal(run(x, weight, bias, 0), F.linear(x, weight, bias))
    assert_bitwise_equal(run(x, weight, bias, 0.5, training=False), F.linear(x, weight, bias))


def test_gradcheck_to_second_order(device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, weight, bias, grad = (t.requires_grad_() for t in operands(2, 34, 3, torch.float64, device))
    function = lambda x, w, b: run(x, w, b, 0.4, key=randfuse.key(1), block_size=32)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))
    kept = torch.tensor([[[1, 2]]])  # the ragged block, and an empty place
    for name, a, b in (("dgrad", grad[None], weight), ("wgrad", grad[None], x[None])):
        product = lambda a, b, name=name: call(f"block_dropout_linear_{name}", a, b, kept, 32, 1.5)  # noqa: E731
        assert torch.autograd.gradcheck(product, (a, b)), name
        assert torch.autograd.gradgradcheck(product, (a, b)), name


@needs_extension
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_and_modes_never_change_a_bit(mode):
    x, weight, _, grad = operands(600, 300, 700, torch.float32, "cpu")
    kept, before, results = torch.tensor([[[0, 2], [1, 3], [0, 1]]]), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with mode():
                y = call("block_dropout_linear", x[None], weight, None, kept, 128, 2.0)
                dx = call("block_dropout_linear_dgrad", grad[None], weight, kept, 128, 2.0)
                dw = call("block_dropout_linear_wgrad", grad[None], x[None], kept, 128, 2.0)
            results.append((y, dx, dw))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)


@needs_extension
def test_what_backward_keeps():
    """x, the weight and the list of kept blocks, which is small."""
    x, weight = torch.randn(512, 512, requires_grad=True), torch.randn(64, 512, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(x, weight, p=0.5)
    own = {t.data_ptr() for t in (x, weight)}
    extra = [t for t in saved if t.data_ptr() not in own]
    assert sum(t.numel() * t.element_size() for t in extra) <= 8 * 2 * 2, [t.shape for t in extra]


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"p": torch.tensor(0.5)}, TypeError, "p must be a float for granularity 'block', whose sizes it sets"),
    ({"p": 1.5}, ValueError, r"p must be in \[0, 1\], got 1.5"),
    ({"block_size": 48}, ValueError, "block_size must be 32, 64 or 128, got 48"),
    ({"row_offset": 128}, ValueError, "row_offset must be a multiple of 256 for granularity 'block', got 128"),
    ({"col_offset": 64}, ValueError, "col_offset must be 0 for granularity 'block', got 64"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
])  # fmt: skip
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=f"^dropout_linear: {message}"):
        run(torch.ones(4, 70), torch.ones(3, 70), **({"key": randfuse.key(0)} | kwargs))


def test_only_triton_has_it_on_a_gpu():
    """A forced CUDA backend says so, before any device is asked for."""
    with pytest.raises((ValueError, RuntimeError), match="backend"), use_backend("cuda"):
        run(torch.ones(4, 70), torch.ones(3, 70), key=randfuse.key(0))
