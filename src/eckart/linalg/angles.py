"""Angles and distance between subspaces, each given by the columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ._prepare import prepare
from .errors import LinalgError
from .svd import singular_values, svd

__all__ = ["principal_angles", "subspace_distance"]


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """Principal angles between span(u) and span(v), ascending, in radians.

        cos θ_i = s_i(Q_uᵀ Q_v),   sin θ_i from (I - Q_u Q_uᵀ) Q_v

    The cosine alone loses half the digits of small angles, so each angle comes from whichever of sine and cosine is
    smaller (Björck and Golub). The columns need not be orthonormal, only independent. O(n (k + l)^2) in float64.

    Args:
        u: (..., n, k), k <= n, any float dtype.
        v: (..., n, l), l <= n.

    Returns:
        (..., min(k, l)) float64, in [0, pi / 2].

    Raises:
        LinalgError: Dependent columns, shapes that do not fit, NaN or Inf.

    Example:
        >>> import torch
        >>> u, v = torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [2.0]])
        >>> round(float(principal_angles(u, v)), 6)  # pi / 4
        0.785398

    Reference:
        Å. Björck and G. Golub, "Numerical methods for computing angles between linear subspaces", Math. Comp. 27
        (1973).
    """
    if u.shape[:-1] != v.shape[:-1]:
        raise LinalgError.about(
            "v", v, f"does not live in the same space as u of shape {tuple(u.shape)}", "give as many rows"
        )
    first, second = _orthonormal(u, "u"), _orthonormal(v, "v")
    if first.shape[-1] < second.shape[-1]:
        first, second = second, first  # the sines below need the smaller space on the right
    overlap = first.mT @ second
    cosines = singular_values(overlap).clamp(max=1)
    sines = singular_values(second - first @ overlap).flip(-1).clamp(max=1)  # ascending, as the angles
    return torch.where(cosines.square() < 0.5, torch.acos(cosines), torch.asin(sines))


def subspace_distance(u: Tensor, v: Tensor) -> Tensor:
    """Projection metric between span(u) and span(v).

        d = ||P_u - P_v||_F / sqrt(2) = sqrt(sum sin^2 θ_i + |k - l| / 2)

    0 for equal spaces, sqrt(k) for orthogonal ones of equal dimension k.

    Args:
        u: (..., n, k) with independent columns, any float dtype.
        v: (..., n, l).

    Returns:
        (...,) float64.

    Raises:
        LinalgError: Dependent columns, shapes that do not fit, NaN or Inf.

    Example:
        >>> import torch
        >>> u, v = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [3.0]])
        >>> float(subspace_distance(u, v))
        1.0
    """
    angles = principal_angles(u, v)
    return (angles.sin().square().sum(dim=-1) + abs(u.shape[-1] - v.shape[-1]) / 2).sqrt()


def _orthonormal(basis: Tensor, name: str) -> Tensor:
    """Orthonormal basis of the span of (..., n, k), float64."""
    work, _, _ = prepare(basis, name, dtype=torch.float64)
    rows, columns = work.shape[-2:]
    norms = torch.linalg.vector_norm(work, dim=-2, keepdim=True)
    # Columns of very different length are no less independent, so they are judged at unit length.
    u, s, _, _ = svd(work / torch.where(norms > 0, norms, 1), driver="exact")
    dependent = s[..., -1:] <= max(rows, columns) * torch.finfo(torch.float64).eps * s[..., :1]
    if columns > rows or bool(dependent.any()):
        raise LinalgError.about(name, basis, "has dependent columns", "give a basis, such as q of linalg.qr")
    return u
