"""dropout and dropout_mask: equality with the reference, exactness of the mean, slices, derivatives, errors."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
from randfuse import _extension, use_backend
from randfuse.testing import assert_bitwise_equal

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Regimes: empty, scalar-like, one ragged group, whole groups, ragged after whole, several rows a key, leading dims.
SHAPES = [(0, 5), (5, 0), (), (1,), (1, 1), (3, 7), (5, 64), (2, 200), (4, 4096), (2, 3, 130)]
OFFSETS = [(0, 0), (3, 5), (100, 64), (2**32 - 100, 2**35 - 5000)]
PROBABILITIES = [0.001, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999]


def reference(function, *args, **kwargs):
    with use_backend("reference"):
        return function(*args, **kwargs)


def with_nan(shape, dtype, device):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if x.numel() > 2:
        x.view(-1)[0], x.view(-1)[1] = math.nan, math.inf
    return x.to(device)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(kernels_device, shape, dtype, offsets):
    device = kernels_device
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, key = with_nan(shape, dtype, device), randfuse.key(7, device)
    place = dict(zip(("row_offset", "col_offset"), offsets, strict=True))
    y = randfuse.dropout(x, 0.3, key=key, **place)
    expected = reference(randfuse.dropout, x, 0.3, key=key, **place)
    assert_bitwise_equal(y.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert y.is_contiguous()
    if x.dim() == 2:
        mask = randfuse.dropout_mask(x.shape, 0.3, key=key, **place)
        assert_bitwise_equal(mask, reference(randfuse.dropout_mask, x.shape, 0.3, key=key, **place))
        assert torch.equal(y != 0, mask & (x != 0)), "a dropped NaN or inf must be 0, a kept one stays"


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last", "offset"])
def test_any_strides(device, layout):
    base = torch.randn(6, 40, 5, 3, device=device)
    x = {
        "transposed": base[:, :, 0, 0].t(),
        "sliced": base[::2, 3:37:2, 1, 1],
        "expanded": base[:, :1, 0, 0].expand(6, 100),
        "channels_last": base.to(memory_format=torch.channels_last),
        "offset": base.view(-1)[7:127].view(3, 40),
    }[layout]
    key = randfuse.key(1, device)
    assert_bitwise_equal(randfuse.dropout(x, 0.4, key=key), randfuse.dropout(x.contiguous(), 0.4, key=key))


def test_a_key_per_run_of_rows(device):
    keys = randfuse.split(randfuse.key(3, device), 4)
    x = torch.randn(4, 6, 50, device=device)
    y = randfuse.dropout(x, 0.5, key=keys)
    for g in range(4):
        assert_bitwise_equal(y[g], randfuse.dropout(x[g], 0.5, key=keys[g]), name=f"key {g}")


@pytest.mark.parametrize("rows", [slice(0, 9), slice(3, 8), slice(8, 9)])
@pytest.mark.parametrize("cols", [slice(0, 300), slice(1, 2), slice(5, 133), slice(64, 128), slice(250, 300)])
def test_slice_of_the_op_is_the_op_on_a_slice(device, rows, cols):
    x, key = torch.randn(9, 300, device=device), randfuse.key(4, device)
    part = randfuse.dropout(x[rows, cols], 0.3, key=key, row_offset=rows.start, col_offset=cols.start)
    assert_bitwise_equal(part, randfuse.dropout(x, 0.3, key=key)[rows, cols])


@pytest.mark.parametrize("p", [0.0, 1.0, 0.3, 2.0**-18])
def test_extremes_and_tensor_p(device, p):
    x, key = with_nan((5, 70), torch.float32, device).requires_grad_(), randfuse.key(0, device)
    y = randfuse.dropout(x, p, key=key)
    y_tensor = randfuse.dropout(x, torch.tensor(p, device=device), key=key)
    assert_bitwise_equal(y.nan_to_num(nan=7.0), y_tensor.nan_to_num(nan=7.0))
    y_tensor.sum().backward()
    assert x.grad.isfinite().all()
    if p == 1:
        assert not y.any()
        assert not x.grad.any()
    if p < 2**-17:
        assert_bitwise_equal(y.nan_to_num(nan=7.0), x.nan_to_num(nan=7.0))


def test_identity_draws_nothing(device):
    x = torch.randn(3, 3, device=device)
    rng_state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    state = rng_state()
    assert randfuse.dropout(x, 0.0) is x
    assert randfuse.dropout(x, 0.5, training=False) is x
    assert torch.equal(rng_state(), state)


def test_calls_without_key_differ_and_follow_manual_seed(device):
    x = torch.ones(64, 64, device=device)
    torch.manual_seed(1)
    a, b = randfuse.dropout(x), randfuse.dropout(x)
    torch.manual_seed(1)
    assert not torch.equal(a, b)
    assert torch.equal(a, randfuse.dropout(x))


@pytest.mark.parametrize("p", PROBABILITIES)
def test_mean_is_unbiased(device, p):
    """n = 2^22: keep rate within 4 standard errors of effective_p, and the mean of the output within 4 of 1."""
    n = 2048
    y = randfuse.dropout(torch.ones(n, n, device=device), p, key=randfuse.key(21, device)).double()
    q = randfuse.effective_p(p)
    se = math.sqrt(q / (1 - q)) / n
    assert abs(float(y.mean()) - 1) < 4 * se, f"mean {float(y.mean())}, standard error {se}"
    assert float((y == 0).double().mean()) == pytest.approx(q, abs=4 * math.sqrt(q * (1 - q)) / n)
    assert float(y.max()) == pytest.approx(1 / (1 - q), rel=1e-6), "the scale is that of the effective p"


def test_threshold_is_exact():
    """Every 16-bit lane value on either side of every threshold, without statistics."""
    key = randfuse.key(2)
    lanes = randfuse.reference.streams.lanes(
        key.expand(512), torch.arange(512), torch.arange(512), op=1, width=16, rounds=7
    )
    for t in (1, 2, 255, 256, 32767, 32768, 65535):
        assert torch.equal(randfuse.dropout_mask((512, 512), t / 65536, key=key), lanes >= t), f"threshold {t}"


def test_gradients(device):
    x = torch.randn(6, 30, device=device, requires_grad=True)
    key, g = randfuse.key(9, device), torch.randn(6, 30, device=device)
    (dx,) = torch.autograd.grad(randfuse.dropout(x, 0.4, key=key), x, g)
    assert_bitwise_equal(dx, randfuse.dropout(g, 0.4, key=key), name="forward and backward share mask and scale")


def test_gradcheck():
    x, key = torch.randn(4, 9, dtype=torch.float64, requires_grad=True), randfuse.key(1)
    assert torch.autograd.gradcheck(lambda x: randfuse.dropout(x, 0.4, key=key), x)
    assert torch.autograd.gradgradcheck(lambda x: randfuse.dropout(x, 0.4, key=key), x)


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
def test_isa_and_threads_never_change_a_bit():
    """10^8 decisions: every instruction set and 1 or 2 threads against each other."""
    shape, key = (8000, 12500), randfuse.key(13)
    masks = {}
    before = torch.get_num_threads()
    try:
        for isa in ("avx512", "avx2", "baseline"):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                active = _extension.module().cap_isa(isa)
                if (active, threads) not in masks:
                    masks[active, threads] = randfuse.dropout_mask(shape, 0.1, key=key, col_offset=3)
    finally:
        torch.set_num_threads(before)
        _extension.module().cap_isa("avx512")
    (name, first), *others = masks.items()
    for other, mask in others:
        assert torch.equal(first, mask), f"{name} and {other} differ in {int((first != mask).sum())} decisions"


@pytest.mark.slow
@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
def test_hundred_million_decisions_equal_the_reference():
    key = randfuse.key(13)
    for row in range(0, 8000, 250):
        args = ((250, 12500), 0.1)
        mask = randfuse.dropout_mask(*args, key=key, row_offset=row)
        expected = reference(randfuse.dropout_mask, *args, key=key, row_offset=row)
        assert torch.equal(mask, expected), f"rows {row}…: {int((mask != expected).sum())} decisions differ"


@pytest.mark.gpu
def test_hundred_million_decisions_on_the_gpu(kernels_device):
    """Against the CPU's kernels, which the test above holds against the reference."""
    if kernels_device != "cuda":
        pytest.skip("the GPU's backends")
    args = ((8000, 12500), 0.1)
    mask = randfuse.dropout_mask(*args, key=randfuse.key(13, "cuda"), col_offset=3).cpu()
    with use_backend("auto"):
        expected = randfuse.dropout_mask(*args, key=randfuse.key(13), col_offset=3)
    assert torch.equal(mask, expected), f"{int((mask != expected).sum())} decisions differ"


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    ({"x": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "x must be float32.*, got torch.int32"),
    ({"x": torch.ones(2, 2, dtype=torch.complex64)}, TypeError, "x must be float32.*, got torch.complex64"),
    ({"p": -0.1}, ValueError, r"p must be in \[0, 1\], got -0.1"),
    ({"p": 1.5}, ValueError, r"p must be in \[0, 1\], got 1.5"),
    ({"p": math.nan}, ValueError, r"p must be in \[0, 1\], got nan"),
    ({"p": "0.5"}, TypeError, "p must be a number .*, got str"),
    ({"p": True}, TypeError, "p must be a number .*, got bool"),
    ({"p": torch.tensor([0.5])}, ValueError, r"p must be a number or a 0-d floating tensor, got \(1,\)"),
    ({"p": torch.tensor(1)}, ValueError, r"p must be a number or a 0-d floating tensor, got \(\) torch.int64"),
    ({"key": 3}, TypeError, "key must be an int64 Tensor .*, got int"),
    ({"key": torch.tensor(1.0)}, TypeError, "key must be int64, got torch.float32"),
    ({"key": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, r"key must have shape \(\) or \(G,\), got \(1, 1\)"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
    ({"key": torch.zeros(0, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 0"),
    ({"key": torch.zeros((), dtype=torch.int64, device="meta")}, ValueError, "key must be on .*, got meta"),
    ({"key": 3, "p": 0.0}, TypeError, "key must be an int64 Tensor .*, got int"),
    ({"key": None, "generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    ({"row_offset": 1.5}, TypeError, "row_offset must be an int, got float"),
    ({"col_offset": "1"}, TypeError, "col_offset must be an int, got str"),
    ({"row_offset": -1}, ValueError, r"row_offset must be in \[0, 2\*\*32 - rows\], got -1"),
    ({"row_offset": 2**32}, ValueError, r"row_offset must be in \[0, 2\*\*32 - rows\], got 4294967296"),
    ({"col_offset": 2**35}, ValueError, r"col_offset must be in \[0, 2\*\*35 - cols\], got 34359738368"),
    ({"generator": torch.Generator()}, ValueError, "generator must be None when key is given, got both"),
])  # fmt: skip
def test_errors(device, kwargs, error, message):
    arguments = {"x": torch.ones(4, 5), "p": 0.5, "key": randfuse.key(0)} | kwargs
    arguments = {
        k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" and k != "p" else v
        for k, v in arguments.items()
    }
    with pytest.raises(error, match=f"^dropout: {message}"):
        randfuse.dropout(**arguments)


def test_tensor_p_out_of_range_raises_where_it_can_be_read():
    x, key = torch.ones(4, 5), randfuse.key(0)
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"^dropout: p must be in \[0, 1\], got "):
            randfuse.dropout(x, torch.tensor(p), key=key)


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"shape": (3,)}, r"shape must be two sizes \(rows, cols\), got \(3,\)"),
    ({"shape": (3, -1)}, r"shape must be two sizes \(rows, cols\), got \(3, -1\)"),
    ({"shape": (3, 2.0)}, r"shape must be two sizes \(rows, cols\), got \(3, 2.0\)"),
    ({"sample": -1}, r"sample must be in \[0, 2\*\*32\), got -1"),
])  # fmt: skip
def test_mask_errors(device, kwargs, message):
    arguments = {"shape": (2, 3), "p": 0.5, "key": randfuse.key(0, device)} | kwargs
    with pytest.raises(ValueError, match=f"^dropout_mask: {message}"):
        randfuse.dropout_mask(**arguments)


@pytest.mark.gpu
def test_more_than_2_to_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    rows, cols = 2**16 + 3, 2**15 + 8
    x, key = torch.ones(rows, cols, dtype=torch.bfloat16, device="cuda"), randfuse.key(1, "cuda")
    y = randfuse.dropout(x, 0.5, key=key)
    tail = reference(randfuse.dropout, x[-3:], 0.5, key=key, row_offset=rows - 3)
    assert_bitwise_equal(y[-3:], tail)


@pytest.mark.gpu
def test_cuda_graph_replays_fresh_masks(device):
    if device != "cuda":
        pytest.skip("CUDA graphs")
    x, key = torch.ones(64, 256, device="cuda"), randfuse.key(0, "cuda")
    randfuse.dropout(x, 0.5, key=key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = randfuse.dropout(x, 0.5, key=key)
    for seed in range(3):
        key.copy_(randfuse.key(seed))
        graph.replay()
        assert_bitwise_equal(y, randfuse.dropout(x, 0.5, key=randfuse.key(seed, "cuda")))
