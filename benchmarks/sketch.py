"""Sketching operators against what one would write without them: `benchmarks/sketch.py [--device cuda] [--json FILE]`.

The cases of `python -m randfuse.bench` are ops that drop elements; a sketch is compared with other *algorithms* for the
same operator, so it has a page of its own. Variants take turns call by call. Every result is checked first: by the same
operator made dense or sparse where that fits, else by what a sketch must keep.

Run with MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592, so that outputs are not fresh pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import randfuse
import scipy.linalg
import torch
from randfuse import sketch
from randfuse.bench import env, timing
from randfuse.integrations import sklearn as integrations
from sklearn import random_projection
from torch import Tensor


class Comparison(NamedTuple):
    title: str
    variants: dict[str, Callable[[], Tensor]]  # the first is randfuse's; others are compared with it
    same: tuple[str, ...]  # variants that compute the very same numbers


def sparse(device: str, nnz: int) -> Comparison:
    """2^18 × 64 -> 1024; the stored matrix is made beforehand."""
    m, n, d = 2**18, 64, 1024
    a, operator = torch.randn(m, n, device=device), sketch.SJLT(d, m, key=randfuse.key(1, device), nnz=nnz)
    rows, signs = operator.entries()
    place = torch.stack([rows.flatten(), torch.arange(m, device=device).repeat(nnz)])
    stored = torch.sparse_coo_tensor(place, signs.flatten().float() * nnz**-0.5, (d, m)).coalesce().to_sparse_csr()
    variants = {
        "randfuse": lambda: operator @ a,
        "torch sparse": lambda: stored @ a,
        "read": lambda: a.sum(),
    }
    if device == "cuda":
        return Comparison(f"SJLT(nnz={nnz}) {m}×{n} -> {d}", variants, ("torch sparse",))
    csr = scipy.sparse.csr_array((stored.values(), stored.col_indices(), stored.crow_indices()), shape=(d, m))
    variants["scipy csr"] = lambda: torch.from_numpy(csr @ a.numpy())
    if nnz == 1:
        variants["clarkson_woodruff"] = lambda: torch.from_numpy(
            scipy.linalg.clarkson_woodruff_transform(a.numpy(), d, 0)
        )
    return Comparison(f"SJLT(nnz={nnz}) {m}×{n} -> {d}", variants, ("torch sparse", "scipy csr"))


def butterfly(x: Tensor) -> Tensor:
    h, n = 1, x.shape[-1]
    while h < n:
        a, b = x.view(*x.shape[:-1], -1, 2, h).unbind(-2)
        x, h = torch.stack((a + b, a - b), -2).view(x.shape), 2 * h
    return x


def hadamard(device: str, bits: int) -> Comparison:
    x = torch.randn(2 ** (22 - bits), 2**bits, device=device)
    variants = {"randfuse": lambda: randfuse.hadamard_transform(x), "torch ops": lambda: butterfly(x), "copy": x.clone}
    return Comparison(f"hadamard_transform {2 ** (22 - bits)}×2^{bits}", variants, ("torch ops",))


def dense(device: str, make: type[sketch.Operator]) -> Comparison:
    m, n, d = 2**14, 256, 512
    a, operator = torch.randn(m, n, device=device), make(d, m, key=randfuse.key(1, device))
    stored = operator.to_dense()
    variants = {
        "randfuse": lambda: operator @ a,
        "randn + matmul": lambda: torch.randn(d, m, device=device) @ a,
        "stored matmul": lambda: stored @ a,
    }
    return Comparison(f"{make.__name__} {d}×{m}×{n}", variants, ("stored matmul",))


def projection() -> Comparison:
    """1000 samples of 10000 features to 1000, at scikit-learn's default density (1 % of the components)."""
    x = torch.randn(1000, 10000)
    models = {
        "randfuse": integrations.SparseRandomProjection(1000, random_state=0),
        "scikit-learn": random_projection.SparseRandomProjection(1000, random_state=0),
        "scikit-learn dense": random_projection.GaussianRandomProjection(1000, random_state=0),
    }
    fitted = {name: model.fit(x.numpy()) for name, model in models.items()}
    variants = {
        name: lambda model=model: torch.from_numpy(model.transform(x.numpy())) for name, model in fitted.items()
    }
    variants["stored components"] = lambda: torch.from_numpy(x.numpy() @ components)
    components = fitted["randfuse"].components_.toarray().T
    return Comparison("SparseRandomProjection.transform 1000×10000 -> 1000", variants, ("stored components",))


def one_vector(device: str) -> Comparison:
    """A gradient of 2^24 parameters, as in data attribution."""
    a, operator = torch.randn(2**24, device=device), sketch.SJLT(4096, 2**24, key=randfuse.key(1, device))
    return Comparison(
        "SJLT(nnz=4) one vector of 2^24 -> 4096", {"randfuse": lambda: operator @ a, "read": lambda: a.sum()}, ()
    )


def measure(comparison: Comparison, clock: timing.Clock, rounds: int) -> dict[str, float]:
    """Median milliseconds by variant, after the check."""
    own = comparison.variants["randfuse"]()
    for name in comparison.same:
        torch.testing.assert_close(own, comparison.variants[name](), rtol=1e-3, atol=1e-3 * float(own.abs().max()))

    samplers = {name: clock.sampler(call)[0] for name, call in comparison.variants.items()}
    samples = timing.interleave(samplers, rounds)
    return {name: 1e3 * statistics.median(s) for name, s in samples.items()}


def run(device: str, rounds: int, only: str = "") -> dict[str, dict[str, float]]:
    """Milliseconds by title, of those that hold `only`, and variant."""
    makers: tuple[Callable[[], Comparison], ...] = (
        lambda: sparse(device, 4),
        lambda: sparse(device, 1),
        lambda: one_vector(device),
        lambda: hadamard(device, 15),
        lambda: hadamard(device, 12),
        lambda: dense(device, sketch.Gaussian),
        lambda: dense(device, sketch.Rademacher),
    )
    if device == "cpu":
        makers += (projection,)
    warnings.filterwarnings("ignore", message="Sparse")  # torch's own notes on its sparse tensors
    clock, results = timing.clock(device, cold=False), {}
    for make in makers:
        comparison = make()
        if only not in comparison.title:
            continue
        times = results[comparison.title] = measure(comparison, clock, rounds)
        print(comparison.title)
        for name, ms in times.items():
            print(f"    {name:18s} {ms:9.2f} ms   {ms / times['randfuse']:6.2f}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="titles that hold this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = run(options.device, options.rounds, options.only)
    if options.json:
        command = f"python benchmarks/sketch.py --device {options.device} --rounds {options.rounds}"
        environment = env.capture(options.device) | {"command": command}
        options.json.write_text(json.dumps({"environment": environment, "ms": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
