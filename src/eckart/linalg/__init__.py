"""Matrices in, matrices out: one service for every decomposition in the library.

Nothing here knows about modules, models or papers on networks. Inputs may be batched, of any float dtype,
rank-deficient, zero, huge (1e30) or tiny (1e-30): the answer is right, or a ``LinalgError`` says what is wrong
and what to do. NaN is never returned. Work is done in float32 (for float32 and half precision) or float64, and
gradients are not recorded.
"""

from __future__ import annotations

from ._prepare import all_finite
from .allocate import Matrix, Policy, allocate
from .angles import principal_angles, subspace_distance
from .eigh import Eigh, eigh
from .errors import LinalgError
from .gram import accumulate_cross_gram, accumulate_gram, symmetrize
from .interpolative import RowPivots, pivot_rows
from .norms import frobenius_norm, nuclear_norm, relative_error, schatten_norm, spectral_norm
from .rank import (
    Form,
    break_even_rank,
    effective_rank,
    elbow_rank,
    energy_at,
    energy_rank,
    num_parameters,
    rank_for_parameters,
    rank_for_ratio,
    stable_rank,
)
from .solve import QR, lstsq, qr, solve_spd
from .svd import SVD, Driver, singular_values, svd
from .weighted import WeightedSVD, weighted_norm, weighted_svd
from .whiten import Whitening, WhiteningForm, whiten

__all__ = [
    "QR",
    "SVD",
    "Driver",
    "Eigh",
    "Form",
    "LinalgError",
    "Matrix",
    "Policy",
    "RowPivots",
    "WeightedSVD",
    "Whitening",
    "WhiteningForm",
    "accumulate_cross_gram",
    "accumulate_gram",
    "all_finite",
    "allocate",
    "break_even_rank",
    "effective_rank",
    "eigh",
    "elbow_rank",
    "energy_at",
    "energy_rank",
    "frobenius_norm",
    "lstsq",
    "nuclear_norm",
    "num_parameters",
    "pivot_rows",
    "principal_angles",
    "qr",
    "rank_for_parameters",
    "rank_for_ratio",
    "relative_error",
    "schatten_norm",
    "singular_values",
    "solve_spd",
    "spectral_norm",
    "stable_rank",
    "subspace_distance",
    "svd",
    "symmetrize",
    "weighted_norm",
    "weighted_svd",
    "whiten",
]
