"""Low-rank approximation that is best under a weight on the rows and one on the columns.

    min over rank(B) <= k of  tr(R (A - B) C (A - B)ᵀ) = ||P (A - B) Q||_F^2        A (m, n), R = PᵀP (m, m), C = QQᵀ

The minimiser of smallest norm follows from the truncated SVD of the matrix whitened on both sides:

    B = P⁺ (P A Q)_k Q⁺

A weight is a Gram matrix, or the vector of its diagonal. In a direction of weight zero A does not matter and B is zero;
``weighted_svd``, which has the column weight only, fills such directions from A and needs no factor of C.

Reference: K. R. Gabriel and S. Zamir, "Lower rank approximation of matrices by least squares with any choice of
weights", Technometrics 21 (1979), for weights of rank one; M. Greenacre, "Theory and Applications of Correspondence
Analysis", Academic Press, 1984, for the generalised SVD.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._prepare import prepare, rescale, result_dtype
from .eigh import eigh, symmetric_part
from .errors import LinalgError
from .svd import Driver, svd
from .whiten import NEGATIVE

__all__ = ["RowColumnWeightedSVD", "row_column_weighted_svd"]


class RowColumnWeightedSVD(NamedTuple):
    """The factors of B = left right, balanced: column i of left and row i of right have weighted length sqrt(s_i).

    Attributes:
        left: (..., m, k), ``leftᵀ R left = diag(s)``.
        right: (..., k, n), ``right C rightᵀ = diag(s)``.
        s: (..., k) leading singular values of P A Q, descending.
        error: (...,) float64, ``||P (A - B) Q||_F``.
    """

    left: Tensor
    right: Tensor
    s: Tensor
    error: Tensor

    def reconstruct(self) -> Tensor:
        """B = left right, (..., m, n)."""
        return self.left @ self.right


def row_column_weighted_svd(
    a: Tensor,
    row_weight: Tensor | None = None,
    column_weight: Tensor | None = None,
    rank: int | None = None,
    *,
    driver: Driver = "exact",
) -> RowColumnWeightedSVD:
    """Best low-rank approximation under a weight on the rows and one on the columns.

        min over rank(B) <= k of  sum_ij r_i c_j (A_ij - B_ij)^2         diagonal weights r (m,), c (n,)
        min over rank(B) <= k of  tr(R (A - B) C (A - B)ᵀ)               Gram matrices R (m, m), C (n, n)

    Closed form, in float64: an SVD of the whitened matrix, and for each Gram matrix an eigendecomposition, O(m^3) or
    O(n^3). For weights that differ from entry to entry there is none: see ``masked_svd``.

    Args:
        a: (..., m, n), any float dtype.
        row_weight: (..., m) nonnegative, or (..., m, m) symmetric positive semidefinite, with the batch dimensions of
            a; None for the identity. Such as the Fisher information of the outputs.
        column_weight: The same for the columns, (..., n) or (..., n, n). Such as the Gram matrix of the inputs.
        rank: Number k, at most min(m, n) are returned; None for all.
        driver: How ``svd`` works; "auto" is faster for few triplets and within 1 % of the best error.

    Returns:
        The factors, in float64 if an argument is, else float32. Eigenvalues of a Gram matrix below its size times
        eps of its dtype (that of float32 for half precision), relative to the largest, count as zero.

    Raises:
        LinalgError: Shapes that do not fit, a weight that is negative or not positive semidefinite, NaN or Inf.
        ValueError: rank below 1.

    Example:
        >>> import torch
        >>> a = torch.diag(torch.tensor([3.0, 2.0]))
        >>> row_column_weighted_svd(a, torch.tensor([1.0, 4.0]), rank=1).reconstruct().abs().tolist()
        [[0.0, 0.0], [0.0, 2.0]]
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}; leave it out for all")
    dtype = result_dtype(*(x for x in (a, row_weight, column_weight) if x is not None))
    work, scale, _ = prepare(a, dtype=torch.float64)
    row, row_inverse, row_scale = _root(row_weight, work, "row_weight")
    column, column_inverse, column_scale = _root(column_weight, work.mT, "column_weight")
    u, s, vh, error = svd(_times(column, _times(row, work).mT).mT, rank, driver=driver)
    root = s.sqrt()[..., None, :]
    left, right = _times(row_inverse, u * root), _times(column_inverse, vh.mT * root).mT
    weighted = scale * row_scale * column_scale
    half = weighted.sqrt()
    return RowColumnWeightedSVD(
        rescale(left, half / row_scale, "left", dtype),
        rescale(right, half / column_scale, "right", dtype),
        rescale(s, weighted, "singular values", dtype),
        error * weighted,
    )


def _root(weight: Tensor | None, a: Tensor, name: str) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """P and P⁺ with PᵀP the scaled weight of the rows of a (..., m, n), and the scale of P.

    Both are (..., m) for a diagonal weight, (..., m, m) for a Gram matrix, None for the identity.
    """
    batch, size = a.shape[:-2], a.shape[-2]
    if weight is None:
        return None, None, torch.ones(batch, dtype=torch.float64, device=a.device)
    if weight.shape == (*batch, size):
        work, scale, _ = prepare(weight[..., None, :], name, dtype=torch.float64)
        values = work[..., 0, :]
        floor, cutoff, vectors = 0.0, 0.0, None
    elif weight.shape == (*batch, size, size):
        work, scale, _ = prepare(weight, name, dtype=torch.float64, square=True)
        values, vectors = eigh(symmetric_part(work, name))
        floor, cutoff = NEGATIVE, size * torch.finfo(result_dtype(weight)).eps
    else:
        remedy = f"give shape {(*batch, size)} or {(*batch, size, size)}"
        raise LinalgError.about(name, weight, f"does not fit a matrix with {size} of them", remedy)
    largest = values.amax(dim=-1, keepdim=True) if size else values.sum(dim=-1, keepdim=True)
    if bool((values < -floor * largest).any()):
        raise LinalgError.about(name, weight, "is negative", "give weights of at least 0 or a Gram matrix")
    seen = values > cutoff * largest
    root = torch.where(seen, values, 0).sqrt()
    inverse = torch.where(seen, 1 / torch.where(seen, root, 1), 0)
    if vectors is None:
        return root, inverse, scale.sqrt()
    return root[..., None] * vectors.mT, vectors * inverse[..., None, :], scale.sqrt()


def _times(factor: Tensor | None, x: Tensor) -> Tensor:
    """Factor times x, for None (the identity), a diagonal or a matrix."""
    if factor is None:
        return x
    return factor @ x if factor.ndim == x.ndim else factor[..., None] * x
