"""The specification: every op in plain PyTorch, with the signature of its registered schema."""

from __future__ import annotations

from collections.abc import Callable

from .block_dropout_linear import block_dropout_linear, block_dropout_linear_dgrad, block_dropout_linear_wgrad
from .dropconnect_linear import dropconnect_linear
from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear, dropout_linear_dgrad, dropout_linear_wgrad
from .kept_blocks import kept_blocks
from .linear_dropout import act_dropout, act_dropout_grad, linear_dropout
from .lora_linear import lora_linear, lora_linear_dgrad, lora_linear_down, lora_linear_wgrad
from .mixout_linear import mixout, mixout_linear
from .multi_sample_cross_entropy import (
    multi_sample_cross_entropy,
    multi_sample_cross_entropy_grad,
    multi_sample_cross_entropy_with_grads,
)
from .multi_sample_linear import multi_sample_linear, multi_sample_linear_dgrad, multi_sample_linear_wgrad
from .multi_sample_scale import multi_sample_scale

FUNCTIONS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        dropout_mask,
        dropout,
        dropout_linear,
        dropout_linear_dgrad,
        dropout_linear_wgrad,
        linear_dropout,
        act_dropout,
        act_dropout_grad,
        dropconnect_linear,
        mixout,
        mixout_linear,
        block_dropout_linear,
        block_dropout_linear_dgrad,
        block_dropout_linear_wgrad,
        kept_blocks,
        multi_sample_cross_entropy,
        multi_sample_cross_entropy_grad,
        multi_sample_cross_entropy_with_grads,
        multi_sample_linear,
        multi_sample_linear_dgrad,
        multi_sample_linear_wgrad,
        multi_sample_scale,
        lora_linear,
        lora_linear_down,
        lora_linear_dgrad,
        lora_linear_wgrad,
    )
}
