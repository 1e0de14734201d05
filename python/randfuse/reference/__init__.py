"""The specification: every op in plain PyTorch, with the signature of its registered schema."""

from __future__ import annotations

from collections.abc import Callable

from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear, dropout_linear_dgrad, dropout_linear_wgrad
from .linear_dropout import act_dropout, act_dropout_grad, linear_dropout
from .lora_linear import lora_linear, lora_linear_dgrad, lora_linear_down, lora_linear_wgrad

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
        lora_linear,
        lora_linear_down,
        lora_linear_dgrad,
        lora_linear_wgrad,
    )
}
