"""All singular vectors of a matrix, of which only a few are ever formed.

    a (m, n), q = min(m, n),   aᵀ a = V diag(s²) Vᵀ for m > n,   a aᵀ = U diag(s²) Uᵀ for m <= n

The eigenvectors of the smaller Gram matrix are one side; the other follows from a v = s u and aᵀ u = s v. Where a
question needs all vectors but only their products with a few given ones, such as |uᵀ u_i| over all i, the long side is
never formed, which makes it two to three times cheaper than a singular value decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._prepare import prepare
from .eigh import eigh

__all__ = ["SingularBasis"]

_FLOOR = 1e-7  # of the largest: the Gram matrix in float64 tells nothing about singular values below


class SingularBasis:
    """Singular values and vectors of one matrix; float64 inside, values good to 1e-8 of the largest. O(m n q + q^3).

    Args:
        a: (m, n), any float dtype.

    Attributes:
        values: (r,) float64, descending; r is the number of singular values above 1e-7 of the largest.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.

    Example:
        >>> basis = SingularBasis(torch.diag(torch.tensor([1.0, 3.0, 0.0])))
        >>> [round(value, 6) for value in basis.values.tolist()], basis.left(1).squeeze().tolist()
        ([3.0, 1.0], [0.0, 1.0, 0.0])
    """

    def __init__(self, a: Tensor) -> None:
        work, scale, _ = prepare(a, dtype=torch.float64)
        self._a = work
        self._tall = work.shape[0] > work.shape[1]
        squares, vectors = eigh(work.mT @ work if self._tall else work @ work.mT)
        values = squares.clamp(min=0).sqrt()
        rank = int((values > _FLOOR * values[:1]).sum())
        self._s, self._vectors = values[:rank], vectors[:, :rank]
        self.values = self._s * scale

    @property
    def rank(self) -> int:
        """Number r of singular values that are told from zero."""
        return self._s.shape[0]

    def left(self, rank: int) -> Tensor:
        """The leading left singular vectors, (m, min(rank, r)) float64, orthonormal columns."""
        vectors = self._vectors[:, :rank]
        return self._a @ vectors / self._s[:rank] if self._tall else vectors

    def right(self, rank: int) -> Tensor:
        """The leading right singular vectors, (n, min(rank, r)) float64, orthonormal columns."""
        vectors = self._vectors[:, :rank]
        return vectors if self._tall else self._a.mT @ vectors / self._s[:rank]

    def left_products(self, x: Tensor) -> Tensor:
        """xᵀ U with all r left singular vectors, (k, r) float64 for x (m, k), without forming U."""
        x = x.to(self._a)
        return x.mT @ self._a @ self._vectors / self._s if self._tall else x.mT @ self._vectors
