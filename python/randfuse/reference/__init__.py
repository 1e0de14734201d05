"""The specification: every op in plain PyTorch, with the signature of its registered schema."""

from __future__ import annotations

from collections.abc import Callable

from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear, dropout_linear_dgrad, dropout_linear_wgrad
from .linear_dropout import act_dropout, act_dropout_grad, linear_dropout
from .multi_sample_cross_entropy import multi_sample_cross_entropy, multi_sample_cross_entropy_grad
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
        multi_sample_cross_entropy,
        multi_sample_cross_entropy_grad,
        multi_sample_linear,
        multi_sample_linear_dgrad,
        multi_sample_linear_wgrad,
        multi_sample_scale,
    )
}
