"""Tiles of the elementwise kernels: a (rows, cols) matrix cut along the stream's blocks of eight columns."""

import triton
import triton.language as tl

_TILE = 4096  # elements of a program: four blocks, that is four 16-byte loads of bf16, for each of 128 threads


@triton.jit
def multiple(size, UNIT: tl.constexpr):
    """`size`, which is a multiple of UNIT, in a form that shows it to the compiler."""
    return size // UNIT * UNIT


@triton.jit
def tile_of_program(rows, cols, shift, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(row, column, inside, block) of this program's tile: columns start at -shift, blocks count from the matrix on."""
    tiles = tl.cdiv(cols + shift, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    start = pid % tiles * BLOCK_C
    col = start - shift + tl.arange(0, BLOCK_C)
    return row, col, (row < rows)[:, None] & ((col >= 0) & (col < cols))[None, :], start // 8


def tiling(rows, cols, shift):
    """Grid and tile sizes: whole rows up to 1024 columns, so that narrow and wide matrices fill their tiles alike."""
    block_c = max(8, min(1024, triton.next_power_of_2(cols + shift)))
    block_r = _TILE // block_c
    grid = (triton.cdiv(rows, block_r) * triton.cdiv(cols + shift, block_c),)
    return grid, {"BLOCK_R": block_r, "BLOCK_C": block_c}
