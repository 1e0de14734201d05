"""Sketching: implicit random operators S (d×m) with E[SᵀS] = I, never stored, on either side, along any dimension.

Which one: `SJLT` by default (one read, a few additions an element); `CountSketch` for sparse data; `SRHT`, `SRDCT` for
orthogonal-type sketches of dense data; `Rademacher` and `Gaussian` for small d or exact theory; `TensorSketch` for
polynomial kernels; `sample_rows` where rows must stay what they are. The algorithms are composed of these and torch.
"""

from .dense import Gaussian, Rademacher
from .kronecker import KroneckerProjection
from .least_squares import lstsq, optimal_sketch_size, ridgeless_risk
from .leverage import leverage_scores, lewis_weights, lp_sensitivities
from .low_rank import svd_lowrank
from .operator import Operator, sketch_many
from .pruning import PruningMask, prune_at_init_mask
from .ridge import RidgeEnsemble
from .sampling import RowSample, approx_matmul, inclusion_probabilities, sample_rows
from .sparse import SJLT, CountSketch
from .tensor_sketch import TensorSketch
from .trigonometric import SRDCT, SRHT
from .vcas import GradientSampler, VarianceController

__all__ = [
    "CountSketch",
    "Gaussian",
    "GradientSampler",
    "KroneckerProjection",
    "Operator",
    "PruningMask",
    "Rademacher",
    "RidgeEnsemble",
    "RowSample",
    "SJLT",
    "SRDCT",
    "SRHT",
    "TensorSketch",
    "VarianceController",
    "approx_matmul",
    "inclusion_probabilities",
    "leverage_scores",
    "lewis_weights",
    "lp_sensitivities",
    "lstsq",
    "optimal_sketch_size",
    "prune_at_init_mask",
    "ridgeless_risk",
    "sample_rows",
    "sketch_many",
    "svd_lowrank",
]
