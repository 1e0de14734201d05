"""lora_updates: equality with the explicit loop over adapters and masks, one read of x, derivatives, memory, errors."""

from __future__ import annotations

import pytest
import randfuse
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from randfuse.testing import assert_bitwise_equal, assert_close_to_float64
from torch.utils._python_dispatch import TorchDispatchMode

RANKS, OUTPUTS, SCALING = [4, 4, 4], [12, 5, 5], [0.5, 1.0, 2.0]
# dtype of x, dtype of the factors
DTYPES = [(t, t) for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
DTYPES += [(torch.bfloat16, torch.float32)]


def adapters(dtype=torch.float32, factors=None, device="cpu", ranks=RANKS, rows=(3, 5), k=70):
    torch.manual_seed(0)
    make = lambda *s, t=factors or dtype: torch.randn(s, dtype=torch.float64).to(t).to(device)  # noqa: E731
    x = make(*rows, k, t=dtype)
    return x, [make(r, k) for r in ranks], [make(n, r) for n, r in zip(OUTPUTS, ranks, strict=True)]


def masks_of(x, p, key, masks):
    rows = x.numel() // x.shape[-1]
    samples = range(3) if masks == "own" else [0, 0, 0]
    return [randfuse.dropout_mask((rows, x.shape[-1]), p, key=key, sample=s).view(x.shape) for s in samples]


def loop(x, lora_a, lora_b, kept, p):
    scale = 1 / (1 - randfuse.effective_p(p))
    dropped = [torch.where(m, x.to(lora_a[0].dtype) * scale, 0) for m in kept]
    return [c * F.linear(F.linear(d, a), b) for d, a, b, c in zip(dropped, lora_a, lora_b, SCALING, strict=True)]


@pytest.mark.parametrize("ranks", [RANKS, [2, 130, 3]])
@pytest.mark.parametrize("masks", ["own", "shared"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_equals_the_loop(device, dtypes, masks, ranks):
    if torch.float64 in dtypes and device != "cpu":
        pytest.skip("float64 is for the CPU")
    operands, key = adapters(*dtypes, device, ranks), randfuse.key(4, device)
    kept = masks_of(operands[0], 0.3, key, masks)
    grads = [torch.randn(3, 5, n, device=device, dtype=torch.float64) for n in OUTPUTS]

    def updates_and_gradients(function, cast):
        x, a, b = (cast(operands[0]).requires_grad_(), *([cast(t).requires_grad_() for t in f] for f in operands[1:]))
        updates = list(function(x, a, b))
        return updates + list(torch.autograd.grad(updates, [x, *a, *b], [g.to(updates[0].dtype) for g in grads]))

    def ours(x, a, b):
        return randfuse.lora_updates(x, a, b, SCALING, 0.3, masks=masks, key=key)

    expected = lambda x, a, b: loop(x, a, b, kept, 0.3)  # noqa: E731
    got, same = (updates_and_gradients(f, torch.clone) for f in (ours, expected))
    exact = updates_and_gradients(expected, torch.Tensor.double)
    for i, (g, e, s) in enumerate(zip(got, exact, same, strict=True)):
        assert g.dtype == s.dtype, f"result {i}"
        tiny = 8 * torch.finfo(g.dtype if device == "cpu" else dtypes[0]).eps
        assert_close_to_float64(g, e, s, name=f"result {i}", tiny=tiny)


@pytest.mark.parametrize(("masks", "ranks", "dtypes", "reads"), [
    ("own", RANKS, (torch.float32, torch.float32), 1),
    ("own", RANKS, (torch.bfloat16, torch.bfloat16), 1),
    ("shared", [2, 3, 5], (torch.float32, torch.float32), 1),
    ("shared", [2, 3, 5], (torch.bfloat16, torch.float32), 1),
    ("own", RANKS, (torch.bfloat16, torch.float32), 3),
    ("own", [2, 3, 5], (torch.float32, torch.float32), 3),
])  # fmt: skip
def test_reads_of_x(masks, ranks, dtypes, reads):
    """How many ops are given x, and that backward keeps nothing of its size but x itself."""
    x, a, b = adapters(*dtypes, ranks=ranks, rows=(300,))
    x.requires_grad_()
    for t in (*a, *b):
        t.requires_grad_()
    given, saved = 0, []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal given
            given += any(isinstance(t, torch.Tensor) and t.data_ptr() == x.data_ptr() for t in args)
            return function(*args, **(kwargs or {}))

    with Reads(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randfuse.lora_updates(x, a, b, SCALING, 0.3, masks=masks)
    kernels = [t for t in saved if t.numel() == x.numel()]
    assert given == reads
    assert kernels, "x must be kept"
    assert all(t.data_ptr() == x.data_ptr() for t in kernels), "only x, never a copy of it"


def test_the_masks_are_those_of_lora_linear():
    x, a, b = adapters()
    key = randfuse.key(9)
    zero = [torch.zeros(len(w), x.shape[-1]) for w in b]
    for p in (0.4, torch.tensor(0.4)):
        updates = randfuse.lora_updates(x, a, b, 2.0, p, key=key)
        for i, update in enumerate(updates):
            whole = randfuse.lora_linear(x, zero[i], None, a[i], b[i], 2.0, p, key=key, sample=i)
            torch.testing.assert_close(update, whole)


@pytest.mark.parametrize("kwargs", [{"p": 0.0}, {"p": 0.5, "training": False}])
def test_without_dropout_nothing_is_drawn(kwargs):
    x, a, b = adapters()
    state = torch.get_rng_state()
    updates = randfuse.lora_updates(x, a, b, SCALING, **kwargs)
    assert_bitwise_equal(torch.get_rng_state(), state)
    for u, e in zip(updates, loop(x, a, b, [torch.ones_like(x).bool()] * 3, 0.0), strict=True):
        torch.testing.assert_close(u, e)


@pytest.mark.parametrize("masks", ["own", "shared"])
def test_gradcheck(masks):
    torch.manual_seed(0)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    factors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 7), (2, 7), (4, 2), (3, 2))]
    run = lambda x, *f: randfuse.lora_updates(x, f[:2], f[2:], 1.5, 0.4, masks=masks, key=randfuse.key(1))  # noqa: E731
    assert torch.autograd.gradcheck(run, [x, *factors])
    assert torch.autograd.gradgradcheck(run, [x, *factors])


def test_compiles_once_for_all_keys_and_p():
    x, a, b = adapters()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = lambda x, key, p: randfuse.lora_updates(x, a, b, SCALING, p, key=key)  # noqa: E731
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for seed in range(3):
        key, p = randfuse.key(seed), torch.tensor(0.1 + 0.2 * seed)
        for got, expected in zip(compiled(x, key, p), function(x, key, p), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_autocast():
    x, a, b = adapters()
    with torch.autocast("cpu", torch.bfloat16):
        updates = randfuse.lora_updates(x, a, b, SCALING, 0.3)
    assert [u.dtype for u in updates] == [torch.bfloat16] * 3


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"lora_b": []}, ValueError, "lora_a, lora_b and scaling must be for the same number of adapters, got 1, 0 and 1"),
    ({"lora_a": [torch.ones(2, 6)]}, ValueError, r"lora_a\[0\] must have shape \(r, K\) with x \(…, K\), got \(2, 6\)"),
    ({"lora_b": [torch.ones(3, 4)]}, ValueError, r"lora_b\[0\] must have shape \(N, r=2\), got \(3, 4\)"),
    ({"lora_b": [torch.ones(3, 2).half()]}, TypeError, r"lora_b\[0\] must be torch.float32, got torch.float16"),
    ({"lora_a": [None]}, TypeError, r"lora_a\[0\] must be a Tensor, got NoneType"),
    ({"scaling": "1"}, TypeError, "scaling must be a number, or one for each adapter, got str"),
    ({"scaling": [torch.ones(())]}, TypeError, "scaling must be a number, or one for each adapter, got Tensor"),
    ({"masks": "one"}, ValueError, "masks must be 'own' or 'shared', got 'one'"),
    ({"p": 1.5}, ValueError, r"p must be in \[0, 1\], got 1.5"),
    ({"x": torch.ones(4, 5).int()}, TypeError, "x must be float32"),
    ({"key": torch.zeros(3).long(), "p": 0.5}, ValueError, "key must have a length that divides the 4 rows, got 3"),
])  # fmt: skip
def test_errors(kwargs, error, message):
    arguments = {"x": torch.ones(4, 5), "lora_a": [torch.ones(2, 5)], "lora_b": [torch.ones(3, 2)], "scaling": [1.0]}
    with pytest.raises(error, match=f"^lora_updates: {message}"):
        randfuse.lora_updates(**(arguments | kwargs))


@pytest.mark.parametrize(("wrong", "got"), [(None, "a Tensor, got NoneType"), (torch.ones(2, 5).int(), "float32")])
def test_autocast_casts_no_wrong_factor(wrong, got):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=rf"lora_a\[0\] must be {got}"):
        randfuse.lora_updates(torch.ones(4, 5), [wrong], [torch.ones(3, 2)])
