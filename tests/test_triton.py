"""The Triton backend against the reference: in Triton's interpreter on the CPU, or compiled on a GPU (`pytest -m gpu`).

Triton chooses between interpreter and compiler when it is imported. So a plain run collects one test for the CPU, which
runs this module again in a process with TRITON_INTERPRET=1, where every test below runs on CPU tensors.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import randfuse
import torch
import torch.nn.functional as F
from randfuse import _extension, _table, reference
from randfuse.reference import streams
from randfuse.reference.linear_dropout import ACTIVATIONS, times_derivative
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64, known_answers

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
on_device = pytest.mark.parametrize("device", ["cpu" if INTERPRETING else GPU])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KAT = Path(__file__).parent / "kat" / "streams.txt"
STREAM = {"p": 0.3, "p_tensor": None, "row_offset": 0, "col_offset": 0}

# The interpreter of Triton 3.6 converts one-element arrays to scalars, which NumPy 2.3 deprecates and 2.4 refuses.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
BROKEN_INTERPRETER = triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"

if not INTERPRETING:
    FILES = sorted(f.name for f in Path(__file__).parent.glob("test_triton*.py") if f.name != "test_triton_aot.py")

    @pytest.mark.slow
    @pytest.mark.skipif(BROKEN_INTERPRETER, reason="Triton 3.6 interprets with NumPy below 2.4 only")
    @pytest.mark.parametrize("file", FILES)
    def test_in_the_interpreter(file):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
        command += [str(Path(__file__).parent / file)]
        run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert run.returncode == 0, f"tests in the interpreter failed:\n{run.stdout[-6000:]}{run.stderr[-2000:]}"


def op(name):
    """The registered op, with keywords as in its schema."""
    import randfuse.triton_kernels  # noqa: F401

    return getattr(torch.ops.randfuse_triton, name)


def word(value, device):
    """An unsigned 64-bit integer as int64 (1,)."""
    return torch.tensor([value - 2**64 if value >= 2**63 else value], device=device)


def answers(kind):
    found = [(a.arguments, a.answers) for a in known_answers(KAT) if a.kind == kind]
    assert found, f"the known-answer file must have lines of {kind}"
    return found


# --- streams: the known answers every backend reads ----------------------------------------------------------------

if INTERPRETING or torch.cuda.is_available():
    from randfuse.triton_kernels import philox

    @triton.jit
    def words_kernel(out_ptr, key_ptr, c_ptr, ROUNDS: tl.constexpr):
        c0, c1 = tl.load(c_ptr).to(tl.uint32), tl.load(c_ptr + 1).to(tl.uint32)
        c2, c3 = tl.load(c_ptr + 2).to(tl.uint32), tl.load(c_ptr + 3).to(tl.uint32)
        r0, r1, r2, r3 = tl.philox(tl.load(key_ptr), c0, c1, c2, c3, ROUNDS)
        tl.store(out_ptr, r0.to(tl.int64))
        tl.store(out_ptr + 1, r1.to(tl.int64))
        tl.store(out_ptr + 2, r2.to(tl.int64))
        tl.store(out_ptr + 3, r3.to(tl.int64))

    @triton.jit
    def fold_in_kernel(out_ptr, key_ptr, data_ptr):
        tl.store(out_ptr, philox.fold_in(tl.load(key_ptr), tl.load(data_ptr)))

    @triton.jit
    def lanes_kernel(out_ptr, key_ptr, first_row, block_ptr, domain, ROWS: tl.constexpr, COLS: tl.constexpr):
        key = tl.load(key_ptr)
        row = (first_row + tl.arange(0, ROWS)).to(tl.uint32)
        lanes = philox.lanes16(key, row, tl.load(block_ptr), 0, domain, COLS)
        place = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        tl.store(out_ptr + place, lanes.to(tl.int32))


@on_device
def test_known_words(device):
    cases = [(c, k0 | k1 << 32, rounds, words) for (rounds, *c, k0, k1), words in answers("philox")]
    for (key, i, j, s, op_id, width, rounds), words in answers("block"):
        cases.append(([j, i, s, streams.domain_word(op_id, width)], key, rounds, words))
    out = torch.empty(4, dtype=torch.int64, device=device)
    for counter, key, rounds, words in cases:
        words_kernel[(1,)](out, word(key, device), torch.tensor(counter, device=device), ROUNDS=rounds)
        assert tuple(out.tolist()) == words, f"block of key {key:x}, counter {counter}, {rounds} rounds"


@on_device
def test_known_fold_in(device):
    out = torch.empty(1, dtype=torch.int64, device=device)
    for (key, data), (derived,) in answers("fold_in"):
        fold_in_kernel[(1,)](out, word(key, device), word(data, device))
        assert out.item() % 2**64 == derived, f"fold_in({key:x}, {data:x})"


@on_device
def test_known_lanes(device):
    def lanes(key, op_id, row, block, rows, cols):
        out = torch.empty(rows, cols, dtype=torch.int32, device=device)
        domain = streams.domain_word(op_id, 16)
        lanes_kernel[(1,)](out, word(key, device), row, word(block, device), domain, ROWS=rows, COLS=cols)
        return out.cpu()

    (((key, op_id, _, _, row, first, count), values),) = [a for a in answers("lanes") if a[0][2] == 16]
    got = lanes(key, op_id, row, first // 8, 1, 32)[0, first % 8 :][:count]
    assert tuple(got.tolist()) == values, "16-bit lanes of one row"

    (((key, op_id, _, _, rows, cols), (digest,)),) = [a for a in answers("digest") if a[0][2] == 16]
    got = lanes(key, op_id, 0, 0, rows, 256)[:, :cols].contiguous()
    assert int(hashlib.sha256(got.numpy().tobytes()).hexdigest()[:32], 16) == digest, "digest of 16-bit lanes"


# --- dropout: every bit --------------------------------------------------------------------------------------------


def same_bits(y, expected, name):
    assert y.is_contiguous(), f"{name}: must be contiguous"
    assert_bitwise_equal(y, expected, name=name)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (1, 1), (0, 5), (5, 0), (5, 3), (2, 5, 40), (10, 1100)])
def test_dropout_equals_reference(device, dtype, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(dtype)
    keys = [torch.tensor(-3, device=device)]
    if len(shape) > 1:
        keys.append(torch.tensor([1, 2, 2**40, -4, 2**62], device=device)[: 1 if shape == (1, 1) else 5])
    for key in keys:
        for row_offset, col_offset in ((0, 0), (2**32 - 10, 8), (1, 2**34 + 11)):
            args = (x, key, 0.3, None, 1, 0, row_offset, col_offset)
            same_bits(op("dropout")(*args), reference.FUNCTIONS["dropout"](*args), f"dropout at {args[-2:]}")


@on_device
@pytest.mark.parametrize("kind", ["float", "float64", "float32", "bfloat16"])
def test_p(device, kind):
    """Every p a float or a tensor can have: ties to even, the ends, and for a tensor what a float would raise for."""
    key, x = torch.tensor(5, device=device), torch.linspace(-2, 2, 4096, device=device).reshape(16, 256)
    for p in (0.0, 2.5 / 65536, 3.5 / 65536, 0.001, 0.5, 0.999, 1.0, -1.0, 2.0, float("nan"), float("inf")):
        if kind == "float":
            if not 0 <= p <= 1:
                continue
            args = (x, key, p, None, 2, 3, 0, 0)
        else:
            args = (x, key, 0.0, torch.tensor(p, dtype=getattr(torch, kind), device=device), 2, 3, 0, 0)
        same_bits(op("dropout")(*args), reference.FUNCTIONS["dropout"](*args), f"p = {p}")


@pytest.mark.slow
@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
@pytest.mark.skipif(not INTERPRETING, reason="on a GPU: test_dropout.py")
def test_hundred_million_decisions(monkeypatch):
    """Against the CPU's kernels, which test_dropout.py holds against the reference. Fewer programs cost less."""
    from randfuse.triton_kernels import elementwise

    monkeypatch.setattr(elementwise, "_TILE", 2**18)
    for row in range(0, 8000, 1000):
        args = (torch.tensor(13), (1000, 12500), 0.1, None, 1, 0, row, 3)
        mask, expected = op("dropout_mask")(*args), torch.ops.randfuse.dropout_mask(*args)
        assert torch.equal(mask, expected), f"rows {row}…: {int((mask != expected).sum())} decisions differ"


@on_device
def test_mask_of_a_slice(device):
    key = torch.tensor(9, device=device)
    whole = op("dropout_mask")(key, [40, 70], **{**STREAM, "op": 1, "sample": 4})
    expected = reference.FUNCTIONS["dropout_mask"](key, [40, 70], 0.3, None, 1, 4, 0, 0)
    same_bits(whole, expected, "mask")
    for row, col in ((0, 8), (3, 0), (7, 13)):
        part = op("dropout_mask")(
            key, [20, 31], **{**STREAM, "op": 1, "sample": 4, "row_offset": row, "col_offset": col}
        )
        same_bits(part, whole[row : row + 20, col : col + 31].contiguous(), f"slice at {row}, {col}")


@on_device
@pytest.mark.parametrize("sample", [2**31 - 1, 2**31, 2**32 - 1])
def test_large_samples(device, sample):
    args = (torch.randn(8, 40, device=device), torch.tensor(9, device=device), 0.3, None, 1, sample, 0, 0)
    same_bits(op("dropout")(*args), reference.FUNCTIONS["dropout"](*args), f"sample {sample}")


@on_device
def test_dropout_selects(device):
    """A dropped NaN or infinity is 0, a kept one stays."""
    key = torch.tensor(2, device=device)
    mask = op("dropout_mask")(key, [8, 64], **{**STREAM, "op": 1, "sample": 0})
    for value in (float("nan"), float("inf")):
        y = op("dropout")(torch.full((8, 64), value, device=device), key, **{**STREAM, "op": 1, "sample": 0})
        assert torch.equal(y == 0, ~mask), f"{value}: zeros must be where the mask drops"
        assert not y[mask].isfinite().any(), f"{value} must stay where kept"


@on_device
def test_strides(device):
    key, base = torch.tensor(4, device=device), torch.randn(40, 40, device=device)
    views = {
        "transposed": base.T,
        "stepped": base[::2, ::2],
        "offset": base[3:, 5:],
        "expanded": base[:1].expand(9, 40),
    }
    for name, x in views.items():
        args = (key, 0.3, None, 1, 0, 0, 0)
        same_bits(op("dropout")(x, *args), reference.FUNCTIONS["dropout"](x, *args), name)
        w = base[:6, : x.shape[1]]
        y = op("dropout_linear")(x, w, None, key, **STREAM)
        expected = reference.FUNCTIONS["dropout_linear"](x, w, None, key, **STREAM)
        torch.testing.assert_close(y, expected, msg=lambda m, name=name: f"dropout_linear of {name} x: {m}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_than_2_31_elements():
    key, cols = torch.tensor(4, device="cuda"), 2**30 + 5
    mask = op("dropout_mask")(key, [2, cols], **{**STREAM, "op": 1, "sample": 0})
    tail = op("dropout_mask")(
        key, [1, 64], **{**STREAM, "op": 1, "sample": 0, "row_offset": 1, "col_offset": cols - 64}
    )
    assert torch.equal(mask[1:, -64:], tail), "decisions beyond 2**31 elements"


# --- products ------------------------------------------------------------------------------------------------------

CASES = [  # M, K, N, key shape, row_offset, col_offset
    (1, 1, 1, (), 0, 0),
    (35, 40, 50, (5,), 2**31, 8),
    (70, 65, 33, (), 3, 2**34 + 3),
    (5, 0, 3, (), 0, 0),
    (0, 3, 2, (5,), 0, 0),
    (3, 8, 0, (), 0, 0),
]


def case(device, dtype, M, K, N, key_shape, row_offset, col_offset):
    torch.manual_seed(1)
    x, w, b, r, g = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (N, K), (N,), (M, N), (M, N)))
    stream = {"key": torch.randint(-(2**62), 2**62, key_shape, device=device), **STREAM}
    return x, w, b, r, g, {**stream, "row_offset": row_offset, "col_offset": col_offset}


def close_to_exact(y, exact, plain, name):
    """The house tolerance; always allowed are one rounding, half an ulp, and in fp32 what hardware exp and erf add."""
    assert y.is_contiguous(), f"{name}: must be contiguous"
    ulps = 2 if y.dtype == torch.float32 else 0.5
    assert_close_to_float64(y, exact, plain, name=name, tiny=ulps * torch.finfo(y.dtype).eps)


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", CASES)
def test_dropout_linear_and_derivatives(device, dtype, sizes):
    x, w, b, _, g, stream = case(device, dtype, *sizes)
    dropped = reference.FUNCTIONS["dropout"](x, op=1, sample=0, **stream)
    for bias in (b, None):
        exact = reference.FUNCTIONS["dropout_linear"](*wide(x, w, bias), **stream)
        y = op("dropout_linear")(x, w, bias, **stream)
        close_to_exact(y, exact, F.linear(dropped, w, bias), "dropout_linear")
    exact = reference.FUNCTIONS["dropout_linear_dgrad"](*wide(g, w), **stream)
    plain = reference.FUNCTIONS["dropout"](g @ w, op=1, sample=0, **stream)
    close_to_exact(op("dropout_linear_dgrad")(g, w, **stream), exact, plain, "dgrad")
    exact = reference.FUNCTIONS["dropout_linear_wgrad"](*wide(g, x), **stream)
    close_to_exact(op("dropout_linear_wgrad")(g, x, **stream), exact, g.T @ dropped, "wgrad")


@on_device
@pytest.mark.parametrize("factors", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", CASES)
def test_lora_linear_and_derivatives(device, dtype, sizes, factors):
    """Tensor cores multiply in the dtype of x: what has the size of the rank is allowed the rounding of that."""
    x, w, b, _, g, stream = case(device, dtype, *sizes)
    stream, rank = {**stream, "sample": 3}, 4
    la, lb, ds = (torch.randn(s, device=device) for s in ((rank, x.shape[1]), (w.shape[0], rank), (x.shape[0], rank)))
    la, lb = la.to(factors or dtype), lb.to(factors or dtype)
    low_a, low_b, low_ds = (t.to(dtype) for t in (la, lb, ds))
    for p in (0.3, 0.0):
        stream["p"] = p
        dropped = reference.FUNCTIONS["dropout"](x, op=1, **stream)
        exact, exact_s = reference.FUNCTIONS["lora_linear"](*wide(x, w, b, la, lb), 1.5, **stream)
        y, s = op("lora_linear")(x, w, b, la, lb, 1.5, **stream)
        plain_s = dropped @ low_a.T
        assert s.dtype == torch.float32
        close_to_exact(y, exact, F.linear(x, w, b) + 1.5 * plain_s @ low_b.T, "lora_linear")
        close_to_exact(s.to(dtype), exact_s, plain_s, "s")
        exact = reference.FUNCTIONS["lora_linear_dgrad"](*wide(g, w, ds, la), **stream)
        plain = g @ w + reference.FUNCTIONS["dropout"](low_ds @ low_a, op=1, **stream)
        close_to_exact(op("lora_linear_dgrad")(g, w, ds, la, **stream), exact, plain, "dgrad")
        exact = reference.FUNCTIONS["lora_linear_wgrad"](*wide(ds, x), **stream)
        close_to_exact(op("lora_linear_wgrad")(ds, x, **stream).to(dtype), exact, low_ds.T @ dropped, "wgrad")


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", CASES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_linear_dropout_and_elementwise(device, dtype, sizes, activation):
    x, w, b, r, g, stream = case(device, dtype, *sizes)
    act = ACTIVATIONS[activation]

    def drop(v):
        return reference.FUNCTIONS["dropout"](v, op=2, sample=0, **stream)

    for bias, residual, save in ((b, r, True), (None, None, False)):
        exact, exact_z = reference.FUNCTIONS["linear_dropout"](*wide(x, w, bias, residual), activation, True, **stream)
        y, z = op("linear_dropout")(x, w, bias, residual, activation, save, **stream)
        plain_z = F.linear(x, w, bias)
        plain = drop(act(plain_z)) + (0 if residual is None else residual)
        close_to_exact(y, exact, plain, f"linear_dropout, {activation}")
        if save:
            close_to_exact(z, exact_z, plain_z, "pre-activation")
        else:
            assert z.shape == (0,), f"linear_dropout: z must be empty unless asked for, got {tuple(z.shape)}"
    for residual in (r, None):
        exact = reference.FUNCTIONS["act_dropout"](*wide(g, residual), activation, **stream)
        plain = drop(act(g)) + (0 if residual is None else residual)
        close_to_exact(op("act_dropout")(g, residual, activation, **stream), exact, plain, f"act_dropout, {activation}")
    exact = reference.FUNCTIONS["act_dropout_grad"](*wide(g, r), activation, **stream)
    plain = times_derivative(drop(g), r, activation)
    y = op("act_dropout_grad")(g, r, activation, **stream)
    close_to_exact(y, exact, plain, f"act_dropout_grad, {activation}")


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding(device, dtype):
    """At p = 0.5 the scale is 2, residual + D(z) rounds once, ties included: every bit is known."""
    torch.manual_seed(3)
    z, residual = (torch.randn(64, 64, device=device).to(dtype) for _ in range(2))
    stream = {**STREAM, "key": torch.tensor(1, device=device), "p": 0.5}
    expected = reference.FUNCTIONS["act_dropout"](z, residual, "none", **stream)
    same_bits(op("act_dropout")(z, residual, "none", **stream), expected, "residual + D(z)")


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("col_offset", [0, 8, 13])
def test_every_tile_gives_the_same_bits(device, dtype, col_offset, monkeypatch):
    """A product with the identity is dropout itself, bit for bit, whatever the tile that autotuning chooses."""
    from randfuse.triton_kernels import dropout_linear, gemm, tuning

    configs = tuning.SINGLE_CONFIGS if dtype == torch.float32 else tuning.HALF_CONFIGS
    if INTERPRETING:
        tiles = ((16, 16, 8, 2), (64, 128, 16, 4))
        configs = [
            triton.Config(dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"), t, strict=True))) for t in tiles
        ]
    n = 40
    x, eye = torch.randn(n, n, device=device).to(dtype), torch.eye(n, device=device).to(dtype)
    stream = {**STREAM, "key": torch.tensor(8, device=device), "col_offset": col_offset}
    expected = reference.FUNCTIONS["dropout"](x, op=1, sample=0, **stream)
    output = reference.FUNCTIONS["dropout"](x, op=2, sample=0, **stream)
    for config in configs:
        for kernel in (
            dropout_linear.dropout_linear_kernel,
            dropout_linear.dropout_linear_wgrad_kernel,
            gemm.product_dropout_kernel,
        ):
            monkeypatch.setattr(kernel, "configs", [config])
        same_bits(op("dropout_linear")(x, eye, None, **stream), expected, f"dropout_linear, {config}")
        same_bits(op("dropout_linear_dgrad")(x, eye, **stream), expected, f"dgrad, {config}")
        same_bits(op("dropout_linear_wgrad")(eye, x, **stream), expected, f"wgrad, {config}")
        same_bits(op("linear_dropout")(x, eye, None, None, "none", False, **stream)[0], output, f"epilogue, {config}")


@on_device
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of inf * 0 in dropped places
def test_dropped_values_of_a_product(device):
    """NaN where x is dropped does not reach y; z = inf where the output is dropped reaches neither y nor a gradient."""
    key = torch.tensor(3, device=device)
    mask = op("dropout_mask")(key, [16, 24], **{**STREAM, "op": 1, "sample": 0})
    x = torch.where(mask, 1.0, float("nan"))
    assert op("dropout_linear")(x, torch.ones(4, 24, device=device), None, key, **STREAM).isfinite().all(), "y"
    assert op("dropout_linear_wgrad")(torch.ones(16, 4, device=device), x, key, **STREAM).isfinite().all(), "wgrad"
    mask = op("dropout_mask")(key, [16, 24], **{**STREAM, "op": 2, "sample": 0})
    z = torch.where(mask, 1.0, float("inf"))
    for activation in ("relu", "gelu", "silu"):
        assert op("act_dropout")(z, None, activation, key, **STREAM).isfinite().all(), f"act_dropout, {activation}"
        g = op("act_dropout_grad")(torch.ones_like(z), z, activation, key, **STREAM)
        assert g.isfinite().all(), f"act_dropout_grad, {activation}"


# --- the op in PyTorch ---------------------------------------------------------------------------------------------


def derivatives(backend, function, *inputs):
    """Value, gradients and gradients of the gradients' squared norm under one backend."""
    with randfuse.use_backend(backend):
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = function(*inputs)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return y, *first, *second


@on_device
@pytest.mark.parametrize("name", ["dropout", "dropout_linear", "relu", "gelu", "silu"])
def test_derivatives(device, name):
    torch.manual_seed(2)
    x, w, b, r = (torch.randn(s, device=device) for s in ((6, 10), (7, 10), (7,), (6, 7)))
    key = torch.tensor([1, 2], device=device)

    def function(*inputs):
        if name == "dropout":
            return randfuse.dropout(inputs[0], 0.4, key=key, col_offset=3)
        if name == "dropout_linear":
            return randfuse.dropout_linear(*inputs, 0.4, key=key, col_offset=3)
        *inputs, residual = inputs
        return randfuse.linear_dropout(*inputs, 0.4, activation=name, residual=residual, key=key)

    inputs = {"dropout": (x,), "dropout_linear": (x, w, b)}.get(name, (x, w, b, r))
    ours, expected = (derivatives(backend, function, *inputs) for backend in ("triton", "reference"))
    for i, (a, e) in enumerate(zip(ours, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=1e-4, msg=lambda m, i=i: f"output {i}: {m}")


@on_device
def test_vmap(device):
    x, w = torch.randn(3, 4, 10, device=device), torch.randn(5, 10, device=device)
    keys = torch.arange(3, device=device)
    with randfuse.use_backend("triton"):
        y = torch.func.vmap(lambda x, k: randfuse.dropout_linear(x, w, None, 0.3, key=k))(x, keys)
        each = [randfuse.dropout_linear(a, w, None, 0.3, key=k) for a, k in zip(x, keys, strict=True)]
    torch.testing.assert_close(y, torch.stack(each), msg=lambda m: f"vmap over keys: {m}")


def samples(device):
    """One call of every op: name -> arguments."""
    x, w, b, r, g, stream = case(device, torch.float32, 6, 10, 7, (2,), 1, 3)
    stream = tuple(stream.values())
    key, *rate = stream[:3]
    sampled = (*stream[:3], 2, *stream[3:])
    x.requires_grad_()
    operators = (key.new_tensor([1, 2]), "rademacher")
    sparse, tree = (operators[0], 8, 3), key.new_tensor([[0, 1]])
    return {
        "accept_path": (tree.new_zeros(1, 3), *torch.zeros(2, 1, 3, device=device).unbind(), tree, tree, 5),
        "tree_keys": (key[0], None, tree),
        "dense_sketch": (torch.randn(9, 3, device=device, requires_grad=True), *operators, 8, 1, 7, 5),
        "dense_sketch_adjoint": (torch.randn(2, 6, 3, device=device, requires_grad=True), *operators, 8, 1, 7, 5, 9),
        "dense_sketch_entries": (*operators, 1, 7, 5, 9),
        "sparse_sketch": (torch.randn(9, 3, device=device, requires_grad=True), *sparse, 1, 7, 5),
        "sparse_sketch_adjoint": (torch.randn(2, 6, 3, device=device, requires_grad=True), *sparse, 1, 7, 5, 9),
        "sparse_sketch_entries": (operators[0], 8, 3, 5, 9),
        "dropout_mask": (key, [6, 10], *rate, 1, 0, 1, 3),
        "dropout": (x, key, *rate, 1, 0, 1, 3),
        "dropout_linear": (x, w, b, *stream),
        "dropout_linear_dgrad": (g, w, *stream),
        "dropout_linear_wgrad": (g, x, *stream),
        "linear_dropout": (x, w, b, r, "gelu", True, *stream),
        "dropconnect_linear": (x, x.detach(), None, *stream),
        "mixout": (x, x.detach(), *stream),
        "mixout_linear": (x, x.detach(), x.detach() / 2, None, *stream),
        "act_dropout": (g, r, "gelu", *stream),
        "act_dropout_grad": (g, r, "gelu", *stream),
        **head_samples(x, w, b, stream),
        **block_samples(x, w, b, g, key),
        **sampler_samples(x.detach()),
        "random_words": (key, key + 2**40, key - 4, 7),
        "lora_linear": (x, w, b, w[:2], g.T[:, :2], 1.5, *sampled),
        "lora_linear_down": (x, w[:2], *sampled),
        "lora_linear_dgrad": (g, w, g[:, :2], w[:2], *sampled),
        "lora_linear_wgrad": (g[:, :2], x, *sampled),
    }


def sampler_samples(x):
    key, one = torch.tensor([3, 4], device=x.device), torch.ones((), dtype=torch.float64)
    acceptance = (x.view(2, 3, -1), key.expand(2, 2), key, x[2:].view(2, 2, -1), None, None, one)
    sampling = (x, key, one, None, one * 0.9, None, None, None, x / 2, 1.5, torch.tensor([5, 0], device=x.device), 3)
    return {
        "categorical_race": (*sampling[:3], *sampling[6:], 2, 8),
        "categorical_sample": (*sampling, "cdf", 2),
        "categorical_sample_with_stats": (*sampling, "race", 2),
        "speculative_accept": (*acceptance, *[None] * 5, "block", 0.1, 0.3, *[None] * 4),
    }


def block_samples(x, w, b, g, key):
    xs, gs = (t.detach().view(2, 3, -1).requires_grad_() for t in (x, g))
    kept = torch.zeros(2, 1, 1, dtype=torch.int64, device=x.device)
    return {
        "block_dropout_linear": (xs, w, b, kept, 32, 1.5),
        "block_dropout_linear_dgrad": (gs, w, kept, 32, 1.5),
        "block_dropout_linear_wgrad": (gs, xs, kept, 32, 1.5),
        "kept_blocks": (key, 3, 7, 2, 5, 1, 2),
    }


def head_samples(x, w, b, stream):
    heads, target = torch.randn(3, *x.shape[:-1], w.shape[0], device=x.device), torch.arange(6, device=x.device)
    key, p, p_tensor, *place = stream
    options = -100, 0.1, *place
    return {
        "multi_sample_linear": (x, w, b, key, 3, *stream[1:]),
        "multi_sample_linear_dgrad": (heads, w, *stream),
        "multi_sample_linear_wgrad": (heads, x, True, *stream),
        "multi_sample_scale": (x, key, 3, *stream[1:]),
        "multi_sample_cross_entropy": (x, w, b, target, None, key, 3, p, p_tensor, *options),
        "multi_sample_cross_entropy_grad": (
            heads[0, :, 0], heads[:, :, 0], x.detach(), w, b, target, None, key, p, p_tensor, *options, [True] * 3,
        ),
    }  # fmt: skip


@on_device
@pytest.mark.parametrize("name", sorted(reference.FUNCTIONS.keys() - _table.CPU_ONLY - _table.NO_TRITON))
def test_opcheck(device, name):
    torch.library.opcheck(op(name), samples(device)[name])


@on_device
def test_an_op_without_a_triton_kernel_says_so(device):
    x = torch.zeros(2, 4, device=device)
    with (
        randfuse.use_backend("triton"),
        pytest.raises(ValueError, match="^hadamard_transform: backend must be 'auto', "),
    ):
        randfuse.hadamard_transform(x)


@on_device
def test_schemas_are_those_of_the_extension(device):
    if not hasattr(torch.ops.randfuse, "dropout"):
        pytest.skip("the C++ extension is not built")
    for name in reference.FUNCTIONS.keys() - _table.CPU_ONLY - _table.NO_TRITON:
        ours, theirs = (
            str(getattr(ns, name).default._schema) for ns in (torch.ops.randfuse_triton, torch.ops.randfuse)
        )
        assert ours.replace("randfuse_triton::", "randfuse::") == theirs, f"{name}: schemas must be equal"


@on_device
def test_errors(device):
    x, w, b, _, g, stream = case(device, torch.float32, 6, 10, 7, (2,), 0, 0)
    x64, half = torch.zeros(6, 10, dtype=torch.float64, device=device), torch.zeros(7, 10, device=device).half()

    def refused(error, message, name, *args, **changes):
        with pytest.raises(error, match=message):
            op(name)(*args, **{**stream, **changes})

    refused(TypeError, "dropout: x must be float32, float16 or bfloat16", "dropout", x64, op=1, sample=0)
    refused(TypeError, "dropout_linear: weight must be torch.float32", "dropout_linear", x, half, None)
    refused(ValueError, r"dropout_linear: weight must have shape \(N, K=10\)", "dropout_linear", x, w[:, :9], None)
    refused(ValueError, r"dropout_linear: bias must have shape \(N,\)", "dropout_linear", x, w, b[:3])
    refused(ValueError, "act_dropout: activation must be one of", "act_dropout", g, None, "tanh")
    refused(ValueError, "act_dropout: residual must have shape", "act_dropout", g, g[:3], "relu")
    refused(ValueError, "linear_dropout: residual must have shape", "linear_dropout", x, w, b, g[:3], "relu", True)
    n_k = r"dropout_linear_dgrad: weight must have shape \(N=7, K\)"
    for weight in (w[:6], w[:, 0], w[None]):
        refused(ValueError, n_k, "dropout_linear_dgrad", g, weight)
    refused(ValueError, "dropout_linear_wgrad: x must have shape", "dropout_linear_wgrad", g, x[:4])
    scalar, one_dimension = x[0, 0], "must have at least one dimension, got 0"
    refused(ValueError, f"dropout_linear: x {one_dimension}", "dropout_linear", scalar, w, None)
    refused(ValueError, f"dropout_linear_dgrad: grad {one_dimension}", "dropout_linear_dgrad", scalar, w)
    refused(ValueError, f"dropout_linear_wgrad: grad {one_dimension}", "dropout_linear_wgrad", scalar, x)
    refused(ValueError, f"dropout_linear_wgrad: x {one_dimension}", "dropout_linear_wgrad", g, scalar)
    for op_id in (-1, 2**16):
        refused(ValueError, r"dropout: op must be in \[0, 2\*\*16\)", "dropout", x, op=op_id, sample=0)
    for shape in ([6], [6, 10, 1], [-6, 10]):
        with pytest.raises(ValueError, match="dropout_mask: shape must be two sizes"):
            op("dropout_mask")(stream["key"], shape, **{**STREAM, "op": 1, "sample": 0})
    wrong = torch.zeros(4, dtype=torch.int64, device=device)
    refused(ValueError, "dropout_linear: key must have a length", "dropout_linear", x, w, b, key=wrong)
    refused(TypeError, "dropout_linear: key must be int64", "dropout_linear", x, w, b, key=wrong[:2].int())
    refused(ValueError, r"dropout_linear: p must be in \[0, 1\]", "dropout_linear", x, w, b, p=1.5)
    refused(ValueError, "dropout_linear: row_offset must be in", "dropout_linear", x, w, b, row_offset=2**32)
