"""Whitening: the factor that turns a Gram-weighted norm into the Frobenius norm.

S Sᵀ = G + shrinkage * mean(diag G) * I,     ||W S||_F^2 = tr(W G Wᵀ)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ._prepare import prepare
from .eigh import eigh, symmetric_part
from .errors import LinalgError

__all__ = ["Whitening", "WhiteningForm", "whiten"]

WhiteningForm = Literal["eigen", "cholesky"]

_EPS = torch.finfo(torch.float64).eps
NEGATIVE = 1e-3  # a Gram matrix summed in float32 may have eigenvalues this far below zero, relative to the largest


@dataclass(frozen=True)
class Whitening:
    """A factor S of a Gram matrix and its inverse, both float64.

    Attributes:
        factor: S (..., n, n); symmetric for "eigen", lower triangular for "cholesky".
        inverse: S^-1 (..., n, n).
        shrinkage: What was added to the diagonal, as a multiple of its mean; 0 for a well-conditioned Gram. The
            largest over a batch.
        rank: Numerical rank of the Gram: eigenvalues above n * eps * the largest. The smallest over a batch.
    """

    factor: Tensor
    inverse: Tensor
    shrinkage: float
    rank: int


def whiten(gram: Tensor, *, form: WhiteningForm = "eigen", shrinkage: float | Literal["auto"] = "auto") -> Whitening:
    """Factors a Gram matrix so that the factor can be inverted.

        S Sᵀ = G + shrinkage * mean(diag G) * I        G = Xᵀ X (n, n)

    "auto" adds the least that brings the condition number down to C = 1 / (n * eps), eps = 2.2e-16: with
    eigenvalues l_1 >= ... >= l_n that is max(0, (l_1 - C l_n) / (C - 1)), so usually nothing. Computed in float64
    whatever the input's dtype, and returned so: the inverse carries the root of the condition number, which
    float32 cannot. "eigen" costs about 9 n^3, "cholesky" about n^3 unless it has to shrink.

    Args:
        gram: (..., n, n) symmetric positive semidefinite, any float dtype. Eigenvalues below zero by less than
            1e-3 of the largest are taken for rounding.
        form: "eigen": the symmetric square root (SVD-LLM V2). "cholesky": the lower Cholesky factor (SVD-LLM).
        shrinkage: "auto", or a multiple of the mean diagonal to add.

    Returns:
        The factor, its inverse, what was added and the numerical rank.

    Raises:
        LinalgError: Not symmetric, not positive semidefinite, zero, NaN or Inf, or a given shrinkage that leaves it
            singular.
        ValueError: Unknown form, negative shrinkage.

    Example:
        >>> import torch
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
        >>> result = whiten(x.T @ x)
        >>> result.factor.tolist(), result.rank, result.shrinkage
        ([[2.0, 0.0], [0.0, 3.0]], 2, 0.0)

    Reference:
        Wang et al., "SVD-LLM", ICLR 2025, arXiv:2403.07378, and "SVD-LLM V2", NAACL 2025, arXiv:2503.12340.
    """
    if form not in get_args(WhiteningForm):
        raise ValueError(f"form must be one of {', '.join(get_args(WhiteningForm))}, not {form!r}")
    if shrinkage != "auto" and not 0 <= shrinkage < float("inf"):
        raise ValueError(f'shrinkage must be "auto" or a number of at least 0, not {shrinkage}')
    work, scale, _ = prepare(gram, "gram", dtype=torch.float64, square=True)
    work = symmetric_part(work, "gram")
    mean = work.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    if not bool((mean > 0).all()):
        raise LinalgError.about(
            "gram",
            gram,
            "is zero (no input ever arrived) or has a negative trace",
            "calibrate with data that reaches this layer, or leave the layer out",
        )
    result = (_cholesky if form == "cholesky" else _eigen)(work, mean, shrinkage)
    root = scale.sqrt()[..., None, None]
    return Whitening(result.factor * root, result.inverse / root, result.shrinkage, result.rank)


def _added(values: Tensor, mean: Tensor, shrinkage: float | Literal["auto"], gram: Tensor) -> Tensor:
    """What is added to the eigenvalues (..., n), largest first: (...,)."""
    first, last = values[..., 0], values[..., -1]
    if bool((last < -NEGATIVE * first).any()):
        raise LinalgError.about("gram", gram, "is not positive semidefinite", "give a Gram matrix such as x.T @ x")
    if shrinkage == "auto":
        condition = 1 / (values.shape[-1] * _EPS)
        return ((first - condition * last) / (condition - 1)).clamp(min=0)
    added = shrinkage * mean
    if bool((last + added <= values.shape[-1] * _EPS * first).any()):
        raise LinalgError.about("gram", gram, f"is singular with shrinkage {shrinkage}", 'use shrinkage="auto"')
    return added


def _numerical_rank(values: Tensor) -> int:
    return int((values > values.shape[-1] * _EPS * values[..., :1]).sum(dim=-1).min())


def _eigen(gram: Tensor, mean: Tensor, shrinkage: float | Literal["auto"]) -> Whitening:
    values, vectors = eigh(gram)
    added = _added(values, mean, shrinkage, gram)
    root = (values + added[..., None]).sqrt()[..., None, :]
    factor, inverse = ((vectors * diagonal) @ vectors.mT for diagonal in (root, 1 / root))
    return Whitening(factor, inverse, float((added / mean).max()), _numerical_rank(values))


def _cholesky(gram: Tensor, mean: Tensor, shrinkage: float | Literal["auto"]) -> Whitening:
    size = gram.shape[-1]
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    if shrinkage == "auto" or shrinkage == 0:
        lower, info = torch.linalg.cholesky_ex(gram)
        if not bool(info.any()):
            inverse = torch.linalg.solve_triangular(lower, eye.expand_as(gram), upper=False)
            # ||G||_F ||L^-1||_F^2 is above the condition number, so the eigenvalues need not be known.
            bound = torch.linalg.matrix_norm(gram) * inverse.square().sum(dim=(-2, -1))
            if bool((bound <= 1 / (size * _EPS)).all()):
                return Whitening(lower, inverse, 0.0, size)
    values = eigh(gram).values
    added = _added(values, mean, shrinkage, gram)
    for _ in range(10):  # at a condition number of 1 / (n eps) rounding may still break the factorisation
        lower, info = torch.linalg.cholesky_ex(gram + added[..., None, None] * eye)
        if not bool(info.any()):
            inverse = torch.linalg.solve_triangular(lower, eye.expand_as(gram), upper=False)
            return Whitening(lower, inverse, float((added / mean).max()), _numerical_rank(values))
        added = torch.where(info > 0, added.clamp(min=size * _EPS * 1e-3 * values[..., 0]) * 2, added)
    raise LinalgError.about("gram", gram, "has no Cholesky factor", 'use form="eigen" or a larger shrinkage')
