"""Structured dropout in Triton against the reference: in the interpreter on the CPU, or compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from randfuse import reference
from randfuse.reference.block_dropout_linear import drop
from test_triton import (
    DTYPES,
    close_to_exact,
    on_device,
    op,
    pytestmark,  # noqa: F401  the interpreter's warnings
    same_bits,
    wide,
)


def choose(device, *arguments):
    return reference.FUNCTIONS["kept_blocks"](torch.arange(arguments[0], device=device), *arguments[1:])


@on_device
@pytest.mark.parametrize("key", [-5, [1, 2**40, -3]])
@pytest.mark.parametrize(
    "law", [(3, 7, 2, 2**31, 1, 0), (1, 3000, 300, 0, 0, 2**32 - 1), (2, 1, 0, 2**30, 1, 5), (2, 0, 0, 0, 0, 0)]
)
def test_choice_equals_reference(device, law, key):
    key = torch.tensor(key, device=device)
    same_bits(op("kept_blocks")(key, *law), reference.FUNCTIONS["kept_blocks"](key, *law), f"choice {law}")


CASES = [  # G, M, K, N, block, kept, coin
    (2, 300, 70, 8, 32, 1, 2**31),
    (1, 40, 200, 50, 64, 2, 2**31),
    (1, 5, 140, 3, 128, 0, 2**31),
    (1, 5, 40, 3, 32, 0, 0),
    (0, 5, 40, 3, 32, 1, 0),
]


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", CASES)
def test_products(device, dtype, sizes):
    torch.manual_seed(1)
    G, M, K, N, block, kept, coin = sizes
    x, w, b, g = (torch.randn(s, device=device).to(dtype) for s in ((G, M, K), (N, K), (N,), (G, M, N)))
    law = choose(device, G, -(-M // 256), -(-K // block), kept, coin, 1, 0), block, 1.7
    dropped = drop(x.float(), *law).to(dtype)
    name = "block_dropout_linear"
    for bias in (b, None):
        exact = reference.FUNCTIONS[name](*wide(x, w, bias), *law)
        close_to_exact(op(name)(x, w, bias, *law), exact, torch.nn.functional.linear(dropped, w, bias), name)
    exact = reference.FUNCTIONS[f"{name}_dgrad"](*wide(g, w), *law)
    close_to_exact(op(f"{name}_dgrad")(g, w, *law), exact, drop(g @ w, *law).to(dtype), "dgrad")
    exact = reference.FUNCTIONS[f"{name}_wgrad"](*wide(g, x), *law)
    plain = g.flatten(0, 1).T @ dropped.flatten(0, 1)
    close_to_exact(op(f"{name}_wgrad")(g, x, *law), exact, plain, "wgrad")


@on_device
def test_dropped_nan_is_never_read(device):
    kept = torch.tensor([[[1]]], device=device)
    x = torch.full((1, 4, 64), float("nan"), device=device)
    x[..., 32:] = 1.0
    w, g = torch.ones(3, 64, device=device), torch.ones(1, 4, 3, device=device)
    assert (op("block_dropout_linear")(x, w, None, kept, 32, 2.0) == 64).all()
    assert (op("block_dropout_linear_wgrad")(g, x, kept, 32, 2.0)[:, 32:] == 8).all()
    assert (op("block_dropout_linear_wgrad")(g, x, kept, 32, 2.0)[:, :32] == 0).all()


@on_device
def test_refusals(device):
    """What the C++ ops refuse, the Triton ops refuse alike."""
    kept = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    x, w, g = torch.ones(1, 4, 64, device=device), torch.ones(3, 64, device=device), torch.ones(1, 4, 3, device=device)
    name = "block_dropout_linear"
    with pytest.raises(ValueError, match=f"^{name}: x must have three dimensions"):
        op(name)(x[0], w, None, kept, 32, 2.0)
    with pytest.raises(ValueError, match=rf"^{name}: kept must have shape \(1, 1, k\), got \(1, 1\)"):
        op(name)(x, w, None, kept[0], 32, 2.0)
    with pytest.raises(TypeError, match=f"^{name}: kept must be torch.int64"):
        op(name)(x, w, None, kept.int(), 32, 2.0)
    with pytest.raises(ValueError, match=f"^{name}: block must be 32, 64 or 128, got 48"):
        op(name)(x, w, None, kept, 48, 2.0)
    with pytest.raises(ValueError, match=rf"^{name}_dgrad: weight must have shape \(N=3, K\)"):
        op(f"{name}_dgrad")(g, w.T, kept, 32, 2.0)
    with pytest.raises(ValueError, match=rf"^{name}_wgrad: x must have shape \(G, M, K\)"):
        op(f"{name}_wgrad")(g, x[:, :3], kept, 32, 2.0)
    key = torch.tensor(1, device=device)
    for arguments, message in (
        ((key, -1, 7, 2, 0, 1, 0), "rows must be in"),
        ((key, 1, 7, 8, 0, 1, 0), "kept must be in"),
        ((key, 1, 7, 7, 5, 1, 0), "coin must be 0 where all are kept"),
        ((key, 1, 7, 2, 0, 1, 2**32), "row_offset must be in"),
    ):
        with pytest.raises(ValueError, match=f"^kept_blocks: {message}"):
            op("kept_blocks")(*arguments)
