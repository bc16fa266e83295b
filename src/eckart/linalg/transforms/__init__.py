"""Orthogonal transforms as operators: forward, adjoint, and the matrix only when asked for.

    OrthogonalTransform.forward(x, dim) = Q x,   .adjoint(x, dim) = Qᵀ x,   .matrix(n) = Q,   Qᵀ Q = I

The one part of ``linalg`` whose functions record gradients and keep the dtype of a half-precision input: optimizers
project gradients with them, and adapters are trained through them. They are plain linear maps, so NaN in a vector
spreads over its result instead of raising; an integer, complex or misshapen input raises ``LinalgError``.
"""

from __future__ import annotations

from .cayley import Cayley, cayley, inverse_cayley
from .contract import OrthogonalTransform
from .dct import DCT, dct, dct_matrix, idct
from .hadamard import Hadamard, hadamard, inverse_hadamard
from .householder import HouseholderProduct, householder_product
from .random_orthogonal import RandomizedHadamard, RandomOrthogonal, random_orthogonal
from .wavelet import Wavelet, WaveletName, inverse_wavelet, wavelet

__all__ = [
    "DCT",
    "Cayley",
    "Hadamard",
    "HouseholderProduct",
    "OrthogonalTransform",
    "RandomOrthogonal",
    "RandomizedHadamard",
    "Wavelet",
    "WaveletName",
    "cayley",
    "dct",
    "dct_matrix",
    "hadamard",
    "householder_product",
    "idct",
    "inverse_cayley",
    "inverse_hadamard",
    "inverse_wavelet",
    "random_orthogonal",
    "wavelet",
]
