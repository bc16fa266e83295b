"""Angles and distances between subspaces, each given by the columns of a matrix."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ._prepare import prepare
from .errors import LinalgError
from .svd import singular_values, svd

__all__ = ["GrassmannMetric", "grassmann_distance", "principal_angles", "subspace_distance", "subspace_overlap"]

GrassmannMetric = Literal["geodesic", "chordal", "gap", "fubini-study", "procrustes"]


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


def grassmann_distance(u: Tensor, v: Tensor, metric: GrassmannMetric = "geodesic") -> Tensor:
    """A metric on subspaces, from the principal angles θ_i between span(u) and span(v).

        geodesic       sqrt(sum θ_i^2)                 length of the shortest path on the Grassmann manifold
        chordal        sqrt(sum sin^2 θ_i)             ||P_u - P_v||_F / √2 for equal dimensions
        gap            sin max θ_i                     ||P_u - P_v||_2
        fubini-study   arccos prod cos θ_i             angle between the wedge products of the bases
        procrustes     2 sqrt(sum sin^2(θ_i / 2))      min over orthogonal R of ||Q_u - Q_v R||_F

    All are accurate for angles down to rounding. Spaces of different dimension are as far apart as if each missing
    angle were π / 2, which keeps these metrics (Ye and Lim); only ``subspace_distance`` counts a missing angle half.

    Args:
        u: (..., n, k) with independent columns, any float dtype.
        v: (..., n, l).
        metric: One of the above.

    Returns:
        (...,) float64.

    Raises:
        LinalgError: Dependent columns, shapes that do not fit, NaN or Inf.
        ValueError: Unknown metric.

    Example:
        >>> import torch
        >>> u, v = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]])
        >>> [round(float(grassmann_distance(u, v, metric)), 4) for metric in ("geodesic", "chordal", "procrustes")]
        [0.7854, 0.7071, 0.7654]

    Reference:
        A. Edelman, T. Arias and S. Smith, "The geometry of algorithms with orthogonality constraints", SIAM J. Matrix
        Anal. Appl. 20 (1998), arXiv:physics/9806030; K. Ye and L.-H. Lim, "Schubert varieties and distances between
        subspaces of different dimensions", SIAM J. Matrix Anal. Appl. 37 (2016), arXiv:1407.0900.
    """
    if metric not in get_args(GrassmannMetric):
        raise ValueError(f"metric must be one of {', '.join(get_args(GrassmannMetric))}, not {metric!r}")
    angles = principal_angles(u, v)
    missing = angles.new_full((*angles.shape[:-1], abs(u.shape[-1] - v.shape[-1])), math.pi / 2)
    angles = torch.cat([angles, missing], dim=-1)
    if metric == "geodesic":
        return torch.linalg.vector_norm(angles, dim=-1)
    sines = angles.sin()
    if metric == "chordal":
        return torch.linalg.vector_norm(sines, dim=-1)
    if metric == "gap":
        return torch.linalg.vector_norm(sines, ord=math.inf, dim=-1) if sines.shape[-1] else sines.sum(dim=-1)
    if metric == "procrustes":
        return 2 * torch.linalg.vector_norm((angles / 2).sin(), dim=-1)
    # 1 - prod cos^2 θ_i without cancellation; the arccosine alone would lose half the digits of a small distance.
    cosine = angles.cos().clamp(min=0).prod(dim=-1)
    sine = torch.expm1(torch.log1p(-sines.square().clamp(max=1)).sum(dim=-1)).abs().sqrt()
    return torch.atan2(sine, cosine)


def subspace_overlap(u: Tensor, v: Tensor) -> Tensor:
    """Similarity of span(u) and span(v): the mean squared cosine of their principal angles.

        φ = ||Q_uᵀ Q_v||_F^2 / min(k, l)

    1 if the smaller space lies in the larger one, 0 if they are orthogonal, and max(k, l) / n on average for random
    spaces.

    Args:
        u: (..., n, k) with independent columns, any float dtype.
        v: (..., n, l).

    Returns:
        (...,) float64, in [0, 1]; 1 if a space is {0}.

    Raises:
        LinalgError: Dependent columns, shapes that do not fit, NaN or Inf.

    Example:
        >>> import torch
        >>> u, v = torch.eye(3)[:, :2], torch.eye(3)[:, 1:]
        >>> round(float(subspace_overlap(u, v)), 6)
        0.5

    Reference:
        E. Hu et al., "LoRA", ICLR 2022, arXiv:2106.09685, section 7.
    """
    cosines = principal_angles(u, v).cos().square()
    return cosines.mean(dim=-1) if cosines.shape[-1] else cosines.sum(dim=-1) + 1


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
