"""Public functions, one op a file: docstring, validation, key handling, derivative and batching rule."""

# Not public: randfuse.sketch, randfuse.keys and randfuse.masked_diffusion are made of them.
from . import dense_sketch, distinct_rows, random_words, sparse_sketch  # noqa: F401
from .categorical_sample import categorical_race, categorical_sample, categorical_sample_with_stats
from .dropconnect_linear import dropconnect, dropconnect_linear
from .dropout import dropout, dropout_mask
from .dropout_linear import dropout_linear
from .embedding_dropout import embedding_dropout
from .hadamard_transform import hadamard_transform
from .linear_categorical_sample import linear_categorical_sample
from .linear_dropout import linear_dropout
from .lora_linear import lora_ensemble, lora_linear
from .lora_updates import lora_updates
from .mc_dropout_predict import mc_dropout_predict
from .mixout_linear import mixout, mixout_linear
from .multi_sample_cross_entropy import multi_sample_cross_entropy
from .multi_sample_linear import multi_sample_linear
from .multi_sample_mse import multi_sample_mse
from .multinomial import multinomial
from .speculative_accept import speculative_accept
from .speculative_accept_tree import speculative_accept_tree

__all__ = [
    "categorical_race",
    "categorical_sample",
    "categorical_sample_with_stats",
    "dropconnect",
    "dropconnect_linear",
    "dropout",
    "dropout_linear",
    "dropout_mask",
    "embedding_dropout",
    "hadamard_transform",
    "linear_categorical_sample",
    "linear_dropout",
    "lora_ensemble",
    "lora_linear",
    "lora_updates",
    "mc_dropout_predict",
    "mixout",
    "mixout_linear",
    "multi_sample_cross_entropy",
    "multi_sample_linear",
    "multi_sample_mse",
    "multinomial",
    "speculative_accept",
    "speculative_accept_tree",
]
