"""`dropconnect_linear`: `dropout`'s pass over the weight (2 moves of NK) and the library's product.

A prologue on the weight operand would draw each decision once for every BLOCK_M rows of x: M/BLOCK_M times 8/2 integer
instructions a weight, where the pass moves 4 bytes a bf16 weight once. From M = 2·BLOCK_M on the pass is cheaper.
"""

import torch.nn.functional as F
from randfuse.reference import streams

from . import launch
from .dropout import dropout


@launch.op(
    "dropconnect_linear(Tensor x, Tensor weight, Tensor? bias, Tensor key, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def dropconnect_linear(x, weight, bias, key, p, p_tensor, row_offset, col_offset):
    launch.linear("dropconnect_linear", x, weight, bias)
    dropped = dropout(weight, key, p, p_tensor, streams.WEIGHT_MASK, 0, row_offset, col_offset)
    return F.linear(x, dropped, bias).contiguous()
