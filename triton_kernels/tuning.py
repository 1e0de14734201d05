"""Tiles that the matrix products are tuned over, and the host side of a product's launch."""

import triton

from .launch import INTERPRETED


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
    ((64, 128, 64), 4, 4),
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
    operand = next(iter(args.values()))
    return SINGLE_CONFIGS if str(operand.dtype) == "torch.float32" else HALF_CONFIGS


def _smallest_of_dtype(configs, args, **_):
    return _of_dtype(configs, args)[-1:]


def tuned(kernel, prune=_of_dtype):
    """Autotune a product over the tiles of its dtype, once for each (N, K), power of two of M and list of blocks."""
    if INTERPRETED:
        return triton.autotune([INTERPRETER_CONFIG], key=[])(kernel)
    key = ("m_class", "N", "K", "DOMAIN", "ACT", "SIZE", "KEPT")
    return triton.autotune(
        HALF_CONFIGS + SINGLE_CONFIGS,
        key=[name for name in key if name in kernel.arg_names],
        prune_configs_by={"early_config_prune": prune},
    )(kernel)


def smallest(kernel):
    """The smallest tile, for kernels that hold a second one."""
    return tuned(kernel, _smallest_of_dtype)


def grid(rows, cols):
    """One program a tile of a (rows, cols) result."""
    return lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(cols, meta["BLOCK_N"]),)


def m_class(rows):
    """Tuning key of a number of rows: sequences of all lengths share a few measurements."""
    return triton.next_power_of_2(max(rows, 1))
