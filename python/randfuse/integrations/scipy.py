"""`scipy.linalg.clarkson_woodruff_transform` by a CountSketch that is never stored."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from .. import keys
from ..sketch import CountSketch, Operator


def clarkson_woodruff_transform(input_matrix: Any, sketch_size: int, rng: Any = None) -> np.ndarray:
    """S A for a CountSketch S (sketch_size, m) and A (m, n), dense or sparse: E‖Sx‖² = ‖x‖².

    Equivalent to: ``scipy.linalg.clarkson_woodruff_transform(input_matrix, sketch_size, rng)``

    The law and the arguments are SciPy's (`rng`: None, an integer or a Generator), the random numbers are not. The
    result is a dense float64 array, float32 of float32 data.

    >>> import numpy as np
    >>> clarkson_woodruff_transform(np.ones((1000, 3)), 50, rng=0).shape
    (50, 3)
    """
    a = as_tensor(input_matrix)
    if a.dim() != 2:
        raise ValueError(f"clarkson_woodruff_transform: input_matrix must be two-dimensional, got {tuple(a.shape)}")
    key = keys.key(int(np.random.default_rng(rng).integers(2**63)))
    return (CountSketch(sketch_size, a.shape[0], key=key) @ a).numpy()


def as_tensor(x: Any) -> Tensor:
    """What NumPy takes as an array, or a SciPy matrix, as a tensor, in CSR if it is sparse; what is not float32 becomes
    float64."""
    x = x if scipy.sparse.issparse(x) else np.asarray(x)
    if x.dtype.kind not in "fiub":
        raise TypeError(f"clarkson_woodruff_transform: input_matrix must hold real numbers, got {x.dtype}")
    dtype = torch.float32 if x.dtype == np.float32 else torch.float64
    if not scipy.sparse.issparse(x):
        x = x if all(stride >= 0 for stride in x.strides) else x.copy()  # which torch does not know
        return torch.from_numpy(np.require(x, requirements="W")).to(dtype)
    x = scipy.sparse.csr_array(x)
    x.sum_duplicates()
    crow, col = (torch.from_numpy(part.astype(np.int64)) for part in (x.indptr, x.indices))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(crow, col, torch.from_numpy(x.data).to(dtype), size=x.shape)


def sketch_rows(operator: Operator, x: Any) -> np.ndarray:
    """x Sᵀ for samples x (n, features)."""
    if scipy.sparse.issparse(x):
        return operator.apply(as_tensor(x.T)).numpy().T
    return operator.apply(as_tensor(x), -1).numpy()
