"""`block_dropout_linear` and the two products of its derivatives, over the blocks that stay and no others.

    y = scale * sum over kept c of x[r, c] W[:, c]ᵀ + bias     loop over the kept list of the tile's row block
    dgrad[r, c] = scale * g[r] W[:, c]                         one tile for each place of the list, zeros by memset
    wgrad[:, c] = scale * sum over r that keep c of g[r]ᵀ x[r, c]   loop over the inverse list

The lists must be strictly ascending, which is not looked at here: it would wait for the device.

No step of a loop tests whether it is kept: (1-p) of the tiles are read and (1-p) 2 M N K flops done. All programs of a
forward or dgrad do the same work to within the coin's one block; in wgrad the lists of columns differ in length, and the
many programs even that out. One program owns one tile of the result: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from randfuse import _checks
from randfuse.reference.block_dropout_linear import ROWS

from . import launch
from .elementwise import multiple
from .gemm import dot, narrow, tile_of_program
from .tuning import m_class, tuned


@triton.jit
def rows_of_tile(tile, M, BLOCK_M: tl.constexpr, ROWS: tl.constexpr):
    """(row block, matrix rows, inside) of a tile of BLOCK_M rows; groups of M rows each start a row block."""
    tiles = tl.cdiv(M, BLOCK_M)
    group = tile // tiles
    row = tile % tiles * BLOCK_M
    own = row + tl.arange(0, BLOCK_M)
    return group * tl.cdiv(M, ROWS) + row // ROWS, group * M + own, (own < M)[:, None]


@triton.jit
def length(kept_ptr, KEPT, blocks):
    """How many blocks a list of KEPT places names: the coin may have left the last one empty."""
    last = tl.load(kept_ptr + KEPT - 1, mask=KEPT > 0, other=-1)
    return KEPT - (last == blocks).to(tl.int64)


@tuned
@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def block_dropout_linear_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, kept_ptr, x_stride: tl.int64, w_stride: tl.int64, rows: tl.int64, M: tl.int64,
    N: tl.int64, K: tl.int64, KEPT: tl.int64, m_class, scale,
    UNIT_N: tl.constexpr, UNIT_K: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """x (rows, K) of groups of M rows, w (N, K), bias (N,) or None -> y (rows, N)."""
    STEP: tl.constexpr = BLOCK_K if BLOCK_K < SIZE else SIZE
    STEPS: tl.constexpr = SIZE // STEP
    N, K = multiple(N, UNIT_N), multiple(K, UNIT_K)
    x_stride, w_stride = multiple(x_stride, UNIT_K), multiple(w_stride, UNIT_K)
    tile_m, tile_n = tile_of_program(rows // M * tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    block, row, row_inside = rows_of_tile(tile_m, M, BLOCK_M, ROWS)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_inside = (cols < N)[None, :]
    kept_ptr += block * KEPT
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, length(kept_ptr, KEPT, tl.cdiv(K, SIZE)) * STEPS):
        k = tl.load(kept_ptr + step // STEPS) * SIZE + step % STEPS * STEP + tl.arange(0, STEP)
        x_mask, w_mask = row_inside & (k < K)[None, :], col_inside & (k < K)[:, None]
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)  # (BLOCK_M, STEP)
        w = tl.load(w_ptr + cols[None, :] * w_stride + k[:, None], mask=w_mask, other=0.0)  # (STEP, BLOCK_N)
        acc = dot(x, w, acc)
    y = acc * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * N + cols[None, :], narrow(y, y_ptr.dtype.element_ty), mask=row_inside & col_inside)


@tuned
@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def block_dropout_linear_dgrad_kernel(
    g_ptr, w_ptr, y_ptr, kept_ptr, g_stride: tl.int64, w_stride: tl.int64, rows: tl.int64, M: tl.int64, N: tl.int64,
    K: tl.int64, KEPT: tl.int64, m_class, scale,
    UNIT_N: tl.constexpr, UNIT_K: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """g (rows, N), w (N, K) -> the kept tiles of y (rows, K), which holds zeros. A tile's columns are BLOCK_N kept ones,
    of several blocks if SIZE is smaller; the summed N goes by BLOCK_K."""
    RUN: tl.constexpr = BLOCK_N if BLOCK_N < SIZE else SIZE
    N, K = multiple(N, UNIT_N), multiple(K, UNIT_K)
    g_stride, w_stride = multiple(g_stride, UNIT_N), multiple(w_stride, UNIT_K)
    tile_m, tile_n = tile_of_program(rows // M * tl.cdiv(M, BLOCK_M), tl.cdiv(KEPT * SIZE, BLOCK_N), GROUP_M)
    block, row, row_inside = rows_of_tile(tile_m, M, BLOCK_M, ROWS)
    place = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(kept_ptr + block * KEPT + place // SIZE, mask=place < KEPT * SIZE, other=K) * SIZE
    # Runs of RUN columns lie together: said here, as the compiler cannot know it of loaded indices.
    cols = tl.max_contiguous(tl.multiple_of(first + place % SIZE, RUN), RUN)
    col_inside = (cols < K)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        g_mask, w_mask = row_inside & (n < N)[None, :], col_inside & (n < N)[:, None]
        g = tl.load(g_ptr + row[:, None] * g_stride + n[None, :], mask=g_mask, other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptr + n[:, None] * w_stride + cols[None, :], mask=w_mask, other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = dot(g, w, acc)
    y = narrow(acc * scale, y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * K + cols[None, :], y, mask=row_inside & col_inside)


@tuned
@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def block_dropout_linear_wgrad_kernel(
    g_ptr, x_ptr, y_ptr, keeper_ptr, count_ptr, g_stride: tl.int64, x_stride: tl.int64, M: tl.int64, N: tl.int64,
    K: tl.int64, BLOCKS: tl.int64, m_class, scale,
    UNIT_N: tl.constexpr, UNIT_K: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """g (rows, N), x (rows, K) -> y (N, K); block c of columns is kept by the count[c] of BLOCKS row blocks that row c of
    keeper lists. The result is tiled (BLOCK_M, BLOCK_N or SIZE), the summed rows by BLOCK_K."""
    WIDTH: tl.constexpr = BLOCK_N if BLOCK_N < SIZE else SIZE
    STEPS: tl.constexpr = ROWS // BLOCK_K
    N, K = multiple(N, UNIT_N), multiple(K, UNIT_K)
    g_stride, x_stride = multiple(g_stride, UNIT_N), multiple(x_stride, UNIT_K)
    tile_n, tile_k = tile_of_program(tl.cdiv(N, BLOCK_M), tl.cdiv(K, WIDTH), GROUP_M)
    n = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k * WIDTH + tl.arange(0, WIDTH)
    block = tile_k * WIDTH // SIZE
    per_group = tl.cdiv(M, ROWS)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for step in range(0, tl.load(count_ptr + block) * STEPS):
        keeper = tl.load(keeper_ptr + block * BLOCKS + step // STEPS)
        own = keeper % per_group * ROWS + step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        row, row_inside = keeper // per_group * M + own, (own < M)[:, None]
        g_mask, x_mask = row_inside & (n < N)[None, :], row_inside & (k < K)[None, :]
        g = tl.load(g_ptr + row[:, None] * g_stride + n[None, :], mask=g_mask, other=0.0)  # (BLOCK_K, BLOCK_M)
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)  # (BLOCK_K, WIDTH)
        acc = dot(tl.trans(g), x, acc)
    y = narrow(acc * scale, y_ptr.dtype.element_ty)
    tl.store(y_ptr + n[:, None] * K + k[None, :], y, mask=(n < N)[:, None] & (k < K)[None, :])


def _groups(op, name, x, kept, block):
    """x (G, M, cols) as a matrix, and the contiguous list (G, row blocks, k) that belongs to it."""
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must have three dimensions (G, M, cols), got {tuple(x.shape)}")
    if kept.dtype != torch.int64 or kept.device != x.device:
        raise TypeError(f"{op}: kept must be torch.int64 on {x.device}, got {kept.dtype} on {kept.device}")
    blocks = triton.cdiv(x.shape[1], ROWS)
    if kept.dim() != 3 or tuple(kept.shape[:2]) != (x.shape[0], blocks):
        raise ValueError(f"{op}: kept must have shape ({x.shape[0]}, {blocks}, k), got {tuple(kept.shape)}")
    if block not in (32, 64, 128):
        raise ValueError(f"{op}: block must be 32, 64 or 128, got {block}")
    return launch.unit_stride_matrix(x), kept.contiguous()


def _tiles(groups, M, cols):
    return lambda meta: (groups * triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(cols, meta["BLOCK_N"]),)


@launch.op("block_dropout_linear(Tensor x, Tensor weight, Tensor? bias, Tensor kept, int block, float scale) -> Tensor")
def block_dropout_linear(x, weight, bias, kept, block, scale):
    launch.linear("block_dropout_linear", x, weight, bias)
    rows, kept = _groups("block_dropout_linear", "x", x, kept, block)
    (G, M, K), N, w = x.shape, weight.shape[0], launch.unit_stride_matrix(weight)
    y = x.new_empty((G, M, N))
    if y.numel() != 0:
        bias = None if bias is None else bias.contiguous()
        block_dropout_linear_kernel[_tiles(G, M, N)](
            rows, w, bias, y, kept, rows.stride(0), w.stride(0), G * M, M, N, K, kept.shape[2], m_class(M), scale,
            UNIT_N=launch.unit(N), UNIT_K=launch.unit(K, rows.stride(0), w.stride(0)), SIZE=block, ROWS=ROWS,
        )  # fmt: skip
    return y


@launch.op("block_dropout_linear_dgrad(Tensor grad, Tensor weight, Tensor kept, int block, float scale) -> Tensor")
def block_dropout_linear_dgrad(grad, weight, kept, block, scale):
    op = "block_dropout_linear_dgrad"
    launch.floating(op, grad=grad, weight=weight)
    g, kept = _groups(op, "grad", grad, kept, block)
    if weight.dim() != 2 or weight.shape[0] != grad.shape[2]:
        raise ValueError(f"{op}: weight must have shape (N={grad.shape[2]}, K), got {tuple(weight.shape)}")
    (G, M, N), K, w = grad.shape, weight.shape[1], launch.unit_stride_matrix(weight)
    y = grad.new_zeros((G, M, K))
    if y.numel() != 0 and kept.numel() != 0:
        block_dropout_linear_dgrad_kernel[_tiles(G, M, kept.shape[2] * block)](
            g, w, y, kept, g.stride(0), w.stride(0), G * M, M, N, K, kept.shape[2], m_class(M), scale,
            UNIT_N=launch.unit(N, g.stride(0)), UNIT_K=launch.unit(K, w.stride(0)), SIZE=block, ROWS=ROWS,
        )  # fmt: skip
    return y


@launch.op("block_dropout_linear_wgrad(Tensor grad, Tensor x, Tensor kept, int block, float scale) -> Tensor")
def block_dropout_linear_wgrad(grad, x, kept, block, scale):
    op = "block_dropout_linear_wgrad"
    launch.floating(op, grad=grad, x=x)
    rows, kept = _groups(op, "x", x, kept, block)
    _checks.shape(op, "x", x, (*grad.shape[:-1], x.shape[-1]), "(G, M, K)")
    g, (_, M, N), K = launch.unit_stride_matrix(grad), grad.shape, x.shape[2]
    y = grad.new_empty((N, K))
    if y.numel() != 0:
        keepers, counts = _inverse(kept, triton.cdiv(K, block))
        block_dropout_linear_wgrad_kernel[
            lambda meta: (triton.cdiv(N, meta["BLOCK_M"]) * triton.cdiv(K, min(meta["BLOCK_N"], block)),)
        ](
            g, rows, y, keepers, counts, g.stride(0), rows.stride(0), M, N, K, keepers.shape[1], m_class(M), scale,
            UNIT_N=launch.unit(N, g.stride(0)), UNIT_K=launch.unit(K, rows.stride(0)), SIZE=block, ROWS=ROWS,
        )  # fmt: skip
    return y


def _inverse(kept, n):
    """For each of n blocks: the row blocks that keep it, ascending, in the first count places of (n, row blocks)."""
    lists = kept.flatten(0, 1)
    keeps = torch.zeros(lists.shape[0], n + 1, dtype=torch.bool, device=kept.device).scatter_(1, lists, True)[:, :n].T
    return (~keeps).to(torch.uint8).argsort(dim=1, stable=True).contiguous(), keeps.sum(1)
