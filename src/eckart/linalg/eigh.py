"""Eigenvalues and eigenvectors of symmetric matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._basis import column_signs
from ._prepare import prepare, rescale
from .errors import LinalgError

__all__ = ["Eigh", "eigh", "symmetric_part"]

_ASYMMETRY = 1e-2  # relative; far above the rounding of a Gram matrix, far below a matrix that is not symmetric


class Eigh(NamedTuple):
    """Leading eigenpairs of a symmetric matrix or of a batch of them.

    Attributes:
        values: (..., k) eigenvalues, DESCENDING (torch.linalg.eigh gives them ascending).
        vectors: (..., n, k) orthonormal columns; the entry of largest magnitude in each is positive.
    """

    values: Tensor
    vectors: Tensor


def eigh(a: Tensor, rank: int | None = None) -> Eigh:
    """Eigendecomposition of a symmetric matrix, largest eigenvalues first.

        a = vectors diag(values) vectorsᵀ

    Computed in the input's dtype (half precision in float32) by divide and conquer, O(n^3); error eps * |value|_max
    in every eigenvalue. The symmetric part is taken, so the rounding of a product such as ``w @ g @ w.T`` does no
    harm. Not differentiable.

    Args:
        a: (..., n, n) symmetric, any float dtype.
        rank: Number k of leading pairs; None for all n.

    Returns:
        The eigenpairs, in float64 for float64 input and float32 otherwise.

    Raises:
        LinalgError: Not square, not symmetric to 1 %, NaN or Inf.
        ValueError: rank below 1.

    Example:
        >>> import torch
        >>> eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).values.tolist()
        [3.0, 1.0]
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}; leave it out for the full decomposition")
    work, scale, _ = prepare(a, square=True)
    values, vectors = _decompose(symmetric_part(work, "a"))
    values, vectors = values.flip(-1)[..., :rank], vectors.flip(-1)[..., :rank]
    return Eigh(rescale(values, scale, "eigenvalues"), vectors * column_signs(vectors))


def symmetric_part(a: Tensor, name: str) -> Tensor:
    """(a + aᵀ) / 2 of a well-scaled a (..., n, n).

    Raises:
        LinalgError: ``a`` differs from it by more than 1 % of the largest entry.
    """
    if a.numel() == 0:
        return a
    part = (a + a.mT) / 2
    if bool(((a - part).abs().amax(dim=(-2, -1)) > _ASYMMETRY * a.abs().amax(dim=(-2, -1))).any()):
        raise LinalgError.about(name, a, "is not symmetric", "give a symmetric matrix such as x.T @ x")
    return part


def _decompose(a: Tensor) -> tuple[Tensor, Tensor]:
    """LAPACK, and where it does not converge once more in float64 with other roundings."""
    for work in (a, a.to(torch.float64) * 0.7):
        try:
            values, vectors = torch.linalg.eigh(work)
        except torch.linalg.LinAlgError:
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            values = values if work is a else values / 0.7
            return values.to(a.dtype), vectors.to(a.dtype)
    raise LinalgError.about("a", a, "no eigensolver converges", "look for entries of wildly different size")
