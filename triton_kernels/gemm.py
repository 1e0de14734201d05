"""Pieces shared by the matrix products: tile order, the plain product, tiles to tune over, rounding.

Operands are row-major with unit column stride. All index arithmetic is 64-bit: sizes and strides are annotated so.
"""

import triton
import triton.language as tl

from .launch import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def tile_of_program(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile row, tile column): GROUP_M tile rows advance together, so that L2 serves both operands again."""
    pid = tl.program_id(0).to(tl.int64)
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = pid - group * GROUP_M * tiles_n
    return first + within % height, within // height


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32. The interpreter multiplies the bit patterns of bfloat16, hence widens first."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to `dtype`, half to even. The interpreter truncates to bfloat16, hence rounds in integers there."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def product(
    a_ptr, b_ptr, a_stride, b_stride_inner, b_stride_col, rows, cols, M, N, INNER,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_INNER: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """fp32 tile (BLOCK_M, BLOCK_N) of A @ B at `rows`, `cols`; either may lie outside of the matrix."""
    row_inside = (rows < M)[:, None]
    col_inside = ((cols >= 0) & (cols < N))[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INNER, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        a_mask = row_inside if EVEN else row_inside & (inner < INNER)[None, :]
        b_mask = col_inside if EVEN else col_inside & (inner < INNER)[:, None]
        a = tl.load(a_ptr + rows[:, None] * a_stride + inner[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + inner[:, None] * b_stride_inner + cols[None, :] * b_stride_col, mask=b_mask, other=0.0)
        acc = dot(a, b, acc)
    return acc


def _configs(*tiles):
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")
    return [
        triton.Config(dict(zip(names, (*tile, 8), strict=True)), num_warps=warps, num_stages=stages)
        for tile, warps, stages in tiles
    ]


# Roles: BLOCK_M, BLOCK_N tile the result, BLOCK_K the summed dimension. Two bytes an element: wgmma tiles, largest first;
# the small ones fill a GPU when the result is small. fp32 runs on the FMA units ("ieee"), where an operand tile
# of 32 deep is all that registers hold.
HALF_CONFIGS = _configs(
    ((128, 256, 64), 8, 3),
    ((128, 128, 64), 8, 4),
    ((128, 128, 64), 4, 3),
    ((128, 64, 64), 4, 4),
    ((64, 64, 64), 4, 4),
)
SINGLE_CONFIGS = _configs(
    ((128, 64, 16), 8, 3),
    ((64, 64, 16), 4, 3),
    ((32, 64, 32), 4, 2),
)
# The interpreter has nothing to tune; small tiles let small matrices cross tile borders.
INTERPRETER_CONFIG = triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2})


def _of_dtype(configs, args, **_):
    return SINGLE_CONFIGS if str(args["y_ptr"].dtype) == "torch.float32" else HALF_CONFIGS


def tuned(even):
    """Autotune a product over the tiles of its dtype, once for each (N, K) and power of two of M.

    `even` says of a launch's arguments whether no tile along the summed dimension is partial.
    """

    def decorate(kernel):
        kernel = triton.heuristics({"EVEN": even})(kernel)
        if _INTERPRETED:
            return triton.autotune([INTERPRETER_CONFIG], key=[])(kernel)
        return triton.autotune(
            HALF_CONFIGS + SINGLE_CONFIGS,
            key=["m_class", "N", "K"],
            prune_configs_by={"early_config_prune": _of_dtype},
        )(kernel)

    return decorate


def grid(rows, cols):
    """One program a tile of a (rows, cols) result."""
    return lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(cols, meta["BLOCK_N"]),)


def m_class(rows):
    """Tuning key of a number of rows: sequences of all lengths share a few measurements."""
    return triton.next_power_of_2(max(rows, 1))
