"""Products of Householder reflections, applied without forming the matrix.

    Q = H_1 H_2 ... H_k = I - V S^-1 Vᵀ,   H_i = I - 2 v_i v_iᵀ / (v_iᵀ v_i),   V (n, k) the v_i scaled to norm one,
    S (k, k) = triu(Vᵀ V, 1) + I / 2

The second form (compact WY, with the triangular factor in closed form) makes k reflections, one after the other, into a
triangular solve and three matrix products.

Reference: T. Joffrain, T. M. Low, E. Quintana-Ortí, R. van de Geijn and F. Van Zee, "Accumulating Householder
transformations, revisited", ACM TOMS 32 (2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LinalgError
from .contract import OrthogonalTransform

__all__ = ["HouseholderProduct", "householder_product"]


def householder_product(x: Tensor, vectors: Tensor, dim: int = -1) -> Tensor:
    """Product of k Householder reflections, applied along one dimension.

        y = H_1 H_2 ... H_k x,   H_i = I - 2 v_i v_iᵀ / (v_iᵀ v_i),   v_i = vectors[i]

    O(n k) for each vector and O(n k^2) once; the matrix (n, n) is never formed. Orthogonal to rounding, whatever
    the size and the angles of the v_i. k reflections, zero rows allowed, reach exactly the orthogonal matrices with
    rank(I - Q) <= k (Cartan and Dieudonné). Differentiable in x and in the vectors.

    Args:
        x: Any shape with n entries along ``dim``, any real float dtype; half precision is computed in float32 and
            returned as it came.
        vectors: (k, n), one reflection a row; their lengths do not matter, a zero row is the identity. Or (..., k, n)
            against x (..., m, n), as in ``x @ matrix``. Rounded to the precision of x.
        dim: The dimension that is transformed.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        LinalgError: ``x`` or ``vectors`` is not real floating point or their lengths differ.

    Example:
        >>> import torch
        >>> householder_product(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]])).tolist()
        [-3.0, 4.0]

    Reference:
        Joffrain et al., "Accumulating Householder transformations, revisited", ACM TOMS 32 (2006).
    """
    return HouseholderProduct(vectors).forward(x, dim)


@dataclass(frozen=True, eq=False)
class HouseholderProduct(OrthogonalTransform):
    """A product of reflections as an operator: ``householder_product`` forward, the reverse order adjoint.

    Attributes:
        vectors: (k, n), or (..., k, n) against x (..., m, n); any real float dtype.

    Example:
        >>> import torch
        >>> HouseholderProduct(torch.tensor([[1.0, 1.0]])).matrix().round().tolist()
        [[0.0, -1.0], [-1.0, 0.0]]
    """

    vectors: Tensor

    def __post_init__(self) -> None:
        if not self.vectors.is_floating_point() or self.vectors.ndim < 2:
            raise LinalgError.about(
                "vectors", self.vectors, "is not a real floating-point matrix", "give one vector in each row"
            )

    def _parameter(self) -> Tensor:
        return self.vectors

    def _forward(self, x: Tensor) -> Tensor:
        v, s = self._factors(x.dtype)
        return x - x @ v.mT @ torch.linalg.solve_triangular(s.mT, v, upper=False)

    def _adjoint(self, x: Tensor) -> Tensor:
        v, s = self._factors(x.dtype)
        return x - x @ v.mT @ torch.linalg.solve_triangular(s, v, upper=True)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Unit vectors V (..., k, n) as rows (or zero) and S (..., k, k) upper triangular."""
        v = self.vectors.to(torch.promote_types(self.vectors.dtype, dtype))
        # A reflection does not depend on the length of its vector, so these factors need no gradient. They keep the
        # squares, and float64 vectors for a float32 input, from overflowing.
        largest = v.detach().abs().amax(dim=-1, keepdim=True)
        v = (v / torch.where(largest > 0, largest, 1)).to(dtype)
        norm = torch.where(largest > 0, v, 1).norm(dim=-1, keepdim=True)  # never the norm of zero: it has no gradient
        v = v / norm
        return v, (v @ v.mT).triu(1) + torch.eye(v.shape[-2], dtype=dtype, device=v.device) / 2
