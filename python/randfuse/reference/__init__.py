"""The specification: every op in plain PyTorch, with the signature of its registered schema."""

from __future__ import annotations

from collections.abc import Callable

from .categorical_sample import categorical_sample, categorical_sample_with_stats
from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear, dropout_linear_dgrad, dropout_linear_wgrad
from .linear_dropout import act_dropout, act_dropout_grad, linear_dropout

FUNCTIONS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        categorical_sample,
        categorical_sample_with_stats,
        dropout_mask,
        dropout,
        dropout_linear,
        dropout_linear_dgrad,
        dropout_linear_wgrad,
        linear_dropout,
        act_dropout,
        act_dropout_grad,
    )
}
