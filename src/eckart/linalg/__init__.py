"""Matrices in, matrices out: one service for every decomposition in the library.

Nothing here knows about modules, models or papers on networks. Inputs may be batched, of any float dtype,
rank-deficient, zero, huge (1e30) or tiny (1e-30): the answer is right, or a ``LinalgError`` says what is wrong
and what to do. NaN is never returned. Work is done in float32 (for float32 and half precision) or float64, and
gradients are not recorded. The exceptions say so: ``transforms`` are plain linear maps that record gradients and let
NaN through, and ``svd_with_gradient``, ``eigh_with_gradient``, ``matrix_sqrt`` are differentiable.
"""

from __future__ import annotations

from ._counts import Form
from ._prepare import all_finite
from .allocate import Matrix, Policy, allocate
from .angles import GrassmannMetric, grassmann_distance, principal_angles, subspace_distance, subspace_overlap
from .cur import CUR, CURCore, CURSelection, Interpolative, InterpolativeSide, cur, interpolative, skeleton
from .dictionary import Dictionary, dictionary
from .differentiable import DifferentiableEigh, DifferentiableSVD, GradientMethod, eigh_with_gradient, svd_with_gradient
from .eigh import Eigh, eigh
from .errors import LinalgError
from .gram import accumulate_cross_gram, accumulate_gram, symmetrize
from .importance import Importance, most_important, sensitivity, triplet_importance, update_importance
from .interpolative import RowPivots, pivot_rows
from .kronecker_sbl import KroneckerSBL, SparsePosterior, SparseSolver, kronecker_posterior, kronecker_sbl
from .ldu import LDU, Pivoting, ldu
from .leverage import ColumnRow, TermSelection, column_row_product, leverage_scores, ridge_leverage_scores
from .marchenko_pastur import (
    gavish_donoho_rank,
    gavish_donoho_threshold,
    marchenko_pastur_edge,
    marchenko_pastur_energy,
    marchenko_pastur_quantile,
    marchenko_pastur_rank,
    noise_level,
)
from .masked import MaskedSVD, masked_svd
from .matrix_sqrt import MatrixSqrt, matrix_sqrt
from .norms import frobenius_norm, nuclear_norm, nuclear_norm_l12, relative_error, schatten_norm, spectral_norm
from .nystrom import Nystrom, NystromSelection, nystrom
from .orthogonal_iteration import orthogonal_iteration
from .power_law import PowerLaw, power_law_tail
from .pursuit import SparseCodes, orthogonal_matching_pursuit
from .randomized_pivoting import PairFactors, PairKind, PairOrder, RandomizedPivoting, factor_by_pairs
from .rank import (
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
from .rank_budget import VarianceMetric, explained_variance_ranks, welore_ranks
from .rank_revealing import RankRevealingQR, rank_revealing_qr
from .robust_pca import RobustPCA, SplitMethod, robust_pca
from .rsvddpd import RSVDDPD, RobustSVD, robust_alpha, robust_rank, robust_svd
from .semi_structured import dense_sparse, keep_n_of_m, n_of_m_mask
from .singular_basis import SingularBasis
from .soft_threshold import hard_threshold, singular_value_threshold, soft_threshold
from .solve import QR, lstsq, qr, solve_spd
from .spectrum import explained_variance_ratio, spectral_entropy
from .svd import SVD, Driver, singular_values, svd
from .svd_operator import OperatorSVD, leading_eigenvectors, svd_operator
from .svd_update import SVDUpdate, UpdatableSVD
from .tensors import (
    CP,
    CPInit,
    KroneckerChoice,
    KroneckerSVD,
    MatrixProductOperator,
    TensorRing,
    TensorTrain,
    Tucker,
    TuckerMethod,
    balanced_factors,
    choose_kronecker_shape,
    cp,
    khatri_rao,
    kronecker_shape,
    kronecker_shapes,
    kronecker_svd,
    matrix_product_operator,
    mode_product,
    multilinear_product,
    rearrange,
    tensor_ring,
    tensor_train,
    tucker,
    unfold,
)
from .thin_product import product_cosine, product_singular_values
from .transforms import (
    DCT,
    Cayley,
    Hadamard,
    HouseholderProduct,
    OrthogonalTransform,
    RandomizedHadamard,
    RandomOrthogonal,
    Wavelet,
    WaveletName,
    cayley,
    dct,
    dct_matrix,
    hadamard,
    householder_product,
    idct,
    inverse_cayley,
    inverse_hadamard,
    inverse_wavelet,
    random_orthogonal,
    wavelet,
)
from .weighted import WeightedSVD, weighted_norm, weighted_svd
from .weighted_both import RowColumnWeightedSVD, row_column_weighted_svd
from .whiten import Whitening, WhiteningForm, whiten

__all__ = [
    "CP",
    "CUR",
    "DCT",
    "LDU",
    "QR",
    "RSVDDPD",
    "SVD",
    "CPInit",
    "CURCore",
    "CURSelection",
    "Cayley",
    "ColumnRow",
    "Dictionary",
    "DifferentiableEigh",
    "DifferentiableSVD",
    "Driver",
    "Eigh",
    "Form",
    "GradientMethod",
    "GrassmannMetric",
    "Hadamard",
    "HouseholderProduct",
    "Importance",
    "Interpolative",
    "InterpolativeSide",
    "KroneckerChoice",
    "KroneckerSBL",
    "KroneckerSVD",
    "LinalgError",
    "MaskedSVD",
    "Matrix",
    "MatrixProductOperator",
    "MatrixSqrt",
    "Nystrom",
    "NystromSelection",
    "OperatorSVD",
    "OrthogonalTransform",
    "PairFactors",
    "PairKind",
    "PairOrder",
    "Pivoting",
    "Policy",
    "PowerLaw",
    "RandomOrthogonal",
    "RandomizedHadamard",
    "RandomizedPivoting",
    "RankRevealingQR",
    "RobustPCA",
    "RobustSVD",
    "RowColumnWeightedSVD",
    "RowPivots",
    "SVDUpdate",
    "SingularBasis",
    "SparseCodes",
    "SparsePosterior",
    "SparseSolver",
    "SplitMethod",
    "TensorRing",
    "TensorTrain",
    "TermSelection",
    "Tucker",
    "TuckerMethod",
    "UpdatableSVD",
    "VarianceMetric",
    "Wavelet",
    "WaveletName",
    "WeightedSVD",
    "Whitening",
    "WhiteningForm",
    "accumulate_cross_gram",
    "accumulate_gram",
    "all_finite",
    "allocate",
    "balanced_factors",
    "break_even_rank",
    "cayley",
    "choose_kronecker_shape",
    "column_row_product",
    "cp",
    "cur",
    "dct",
    "dct_matrix",
    "dense_sparse",
    "dictionary",
    "effective_rank",
    "eigh",
    "eigh_with_gradient",
    "elbow_rank",
    "energy_at",
    "energy_rank",
    "explained_variance_ranks",
    "explained_variance_ratio",
    "factor_by_pairs",
    "frobenius_norm",
    "gavish_donoho_rank",
    "gavish_donoho_threshold",
    "grassmann_distance",
    "hadamard",
    "hard_threshold",
    "householder_product",
    "idct",
    "interpolative",
    "inverse_cayley",
    "inverse_hadamard",
    "inverse_wavelet",
    "keep_n_of_m",
    "khatri_rao",
    "kronecker_posterior",
    "kronecker_sbl",
    "kronecker_shape",
    "kronecker_shapes",
    "kronecker_svd",
    "ldu",
    "leading_eigenvectors",
    "leverage_scores",
    "lstsq",
    "marchenko_pastur_edge",
    "marchenko_pastur_energy",
    "marchenko_pastur_quantile",
    "marchenko_pastur_rank",
    "masked_svd",
    "matrix_product_operator",
    "matrix_sqrt",
    "mode_product",
    "most_important",
    "multilinear_product",
    "n_of_m_mask",
    "noise_level",
    "nuclear_norm",
    "nuclear_norm_l12",
    "num_parameters",
    "nystrom",
    "orthogonal_iteration",
    "orthogonal_matching_pursuit",
    "pivot_rows",
    "power_law_tail",
    "principal_angles",
    "product_cosine",
    "product_singular_values",
    "qr",
    "random_orthogonal",
    "rank_for_parameters",
    "rank_for_ratio",
    "rank_revealing_qr",
    "rearrange",
    "relative_error",
    "ridge_leverage_scores",
    "robust_alpha",
    "robust_pca",
    "robust_rank",
    "robust_svd",
    "row_column_weighted_svd",
    "schatten_norm",
    "sensitivity",
    "singular_value_threshold",
    "singular_values",
    "skeleton",
    "soft_threshold",
    "solve_spd",
    "spectral_entropy",
    "spectral_norm",
    "stable_rank",
    "subspace_distance",
    "subspace_overlap",
    "svd",
    "svd_operator",
    "svd_with_gradient",
    "symmetrize",
    "tensor_ring",
    "tensor_train",
    "triplet_importance",
    "tucker",
    "unfold",
    "update_importance",
    "wavelet",
    "weighted_norm",
    "weighted_svd",
    "welore_ranks",
    "whiten",
]
