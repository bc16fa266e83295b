"""Low-rank approximation that is best for the output of a linear map, not for its matrix.

    min over rank(B) <= k of  tr((A - B) G (A - B)^T)      A (m, n), G = X^T X (n, n)

With any factor G = S S^T the minimiser is the truncated SVD of A S, multiplied by S^-1. The inverse is
not needed: the minimiser is the projection B = U U^T A, with U (m, k) the leading left singular vectors
of A S, which are the leading eigenvectors of the output Gram matrix A G A^T. So one symmetric
eigenproblem of the smaller side replaces a factorisation of G, an SVD of A S and a triangular solve.

A diagonal G is given as the vector of its diagonal; no G means G = I, the plain truncated SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._deflate import eigh_without_outliers
from ._prepare import all_finite
from .eigh import eigh
from .errors import LinalgError
from .solve import qr
from .whiten import whiten

__all__ = ["WeightedSVD", "weighted_norm", "weighted_svd"]

# A float32 eigenproblem disturbs the subspace by about eps * lambda_1. As long as the smallest wanted
# eigenvalue is this many times above that, the squared error grows by less than 0.04 % (measured on
# the 210 matrices of a 135M language model at two ranks); below it, float64 is used.
_FLOAT32_MARGIN = 256.0
# Products of scaled weights with Gram matrices of this size stay far inside float64's range.
_SAFE = (1e-60, 1e60)
_PANEL = 512  # rows of a Gram matrix that are converted at a time

# How much a direction counts that the weight does not see, relative to the mean of its diagonal. Rank that is left
# over then goes to the matrix itself and not to rounding noise, which differs from machine to machine.
_UNSEEN = 1e-10


@dataclass(frozen=True)
class WeightedSVD:
    """The leading output directions of a matrix under a weight.

    Attributes:
        basis: (m, k) orthonormal columns U, most important first; U[:, :r] is the answer at every r <= k.
        s: (min(m, n),) float64, all singular values of A S, descending; the squared error of rank r is
            ``(s[r:] ** 2).sum()``. Good to 1e-3 of the first one, or to 1e-7 of it if worked out in float64.
    """

    basis: torch.Tensor
    s: torch.Tensor

    def tail(self, rank: int) -> float:
        """Weighted Frobenius norm of what is lost at ``rank``."""
        return float(self.s[rank:].square().sum().sqrt())


def weighted_svd(
    a: torch.Tensor,
    gram: torch.Tensor | None = None,
    rank: int | None = None,
    *,
    factor: torch.Tensor | None = None,
    double: bool = False,
) -> WeightedSVD:
    """Find U with U U^T A the best approximation of A (m, n) under the weight G = S S^T.

    Cost: an eigenproblem of order min(m, n), and the products that form it. It is solved in float32
    where that is accurate enough (see ``_FLOAT32_MARGIN``) and in float64 where it is not.

    Args:
        a: (m, n) matrix, any float dtype.
        gram: (n, n) symmetric positive semidefinite weight, (n,) diagonal weight, or None for identity.
            Its scale does not matter to U.
        rank: number k of directions; default min(m, n).
        factor: (n, n) S with S S^T = gram, if the caller has it already; used when m > n only.
        double: work in float64 throughout.

    Returns:
        The basis, in float32, or float64 if ``a`` is or ``double``; and the weighted singular values.

    Raises:
        LinalgError: the shapes do not fit, an input is empty or not finite, or the weight has a negative diagonal.
        ValueError: rank below 1.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, x = (torch.randn(*shape, generator=generator).double() for shape in ((6, 4), (50, 4)))
        >>> result = weighted_svd(a, x.T @ x, rank=2)
        >>> b = result.basis @ (result.basis.T @ a)
        >>> bool(torch.isclose((x @ (a - b).T).norm(), torch.tensor(result.tail(2)).double()))
        True

    Reference:
        Wang et al., SVD-LLM (arXiv 2403.07378), for the objective; the projection form is Yu and Wu,
        Compressing Transformers: Features Are Low-Rank, but Weights Are Not!, AAAI 2023.
    """
    _check(a, gram, rank)
    rows, columns = a.shape
    k = min(rows, columns) if rank is None else min(rank, rows, columns)
    double = double or a.dtype == torch.float64
    # Scaled to order one where squares would overflow or vanish; undone on the singular values.
    low, high = torch.aminmax(a)
    a_scale = max(-float(low), float(high)) or 1.0
    if 1e-6 < a_scale < 1e6:
        a_scale = 1.0
    # The largest entry of a positive semidefinite matrix is on its diagonal.
    g_scale = float((gram if gram.ndim == 1 else gram.diagonal()).max()) if gram is not None else 1.0
    if g_scale == 0.0:
        gram, g_scale = None, 1.0  # A weight that is zero everywhere prefers no direction.
    for dtype in (torch.float64,) if double else (torch.float32, torch.float64):
        if dtype == torch.float64 and _SAFE[0] < g_scale < _SAFE[1]:
            g_scale = 1.0  # float64 has the room, and a large Gram matrix need not be copied
        values, basis = _leading(a.to(dtype) if a_scale == 1.0 else a.to(dtype) / a_scale, gram, g_scale, k, factor)
        floor = _FLOAT32_MARGIN * torch.finfo(torch.float32).eps / 2 * float(values[0])
        # All m directions are a basis of everything, whatever their order.
        if dtype == torch.float64 or k == rows or float(values[k - 1]) >= floor:
            break
    s = values.double().clamp_min(0).sqrt() * (a_scale * g_scale**0.5)
    return WeightedSVD(basis=basis.to(torch.float64 if double else torch.float32), s=s)


def weighted_norm(a: torch.Tensor, gram: torch.Tensor) -> float:
    """Root of tr(A G A^T), the norm of what A (m, n) makes of inputs with Gram matrix G (n, n); in float32."""
    scale = float(gram.diagonal().max()) or 1.0
    a = a.float()
    return float((_times(a, gram, scale) * a).sum().clamp_min(0).sqrt()) * scale**0.5


def _times(a: torch.Tensor, gram: torch.Tensor, scale: float) -> torch.Tensor:
    """A G / scale in A's dtype; a float64 G (n, n) is divided and rounded panel by panel, never copied whole."""
    if gram.dtype == a.dtype and scale == 1.0:
        return a @ gram
    out = a.new_empty(a.shape[0], gram.shape[1])
    for start in range(0, gram.shape[0], _PANEL):
        rows = gram[start : start + _PANEL]
        panel = torch.div(rows, scale, out=torch.empty_like(rows, dtype=a.dtype))
        out[:, start : start + _PANEL] = a @ panel.mT
    return out


def _check(a: torch.Tensor, gram: torch.Tensor | None, rank: int | None) -> None:
    if a.ndim != 2 or 0 in a.shape:
        raise LinalgError.about("a", a, "is not a matrix with entries", "give it two dimensions, rows and columns")
    columns = a.shape[1]
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}; leave it out for all directions")
    if gram is not None and gram.shape not in ((columns, columns), (columns,)):
        raise LinalgError.about("weight", gram, f"does not fit a matrix of {columns} columns", "give one row a column")
    for name, tensor in (("a", a), ("weight", gram)):
        if tensor is not None and not all_finite(tensor):
            raise LinalgError.about(name, tensor, "contains NaN or Inf", "find where it comes from, or mask it")
    if gram is not None and bool((gram if gram.ndim == 1 else gram.diagonal()).lt(0).any()):
        raise LinalgError.about("weight", gram, "has a negative diagonal", "give a Gram matrix such as x.T @ x")


def _leading(
    a: torch.Tensor, gram: torch.Tensor | None, g_scale: float, k: int, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues and the k leading eigenvectors of A (G / g_scale) A^T, through the smaller Gram matrix."""
    rows, columns = a.shape
    if gram is None:
        scaled = a
        if rows <= columns:
            return _top(a @ a.mT, k)
    elif gram.ndim == 1:
        diagonal = (gram / g_scale).to(a.dtype)
        scaled = a * (diagonal + _UNSEEN * diagonal.mean()).sqrt()
        if rows <= columns:
            return _top(scaled @ scaled.mT, k)
    else:
        floor = _UNSEEN * float(gram.diagonal().mean()) / g_scale
        if rows <= columns:
            return _top(_times(a, gram, g_scale).add_(a, alpha=floor) @ a.mT, k)
        if factor is None:
            factor = _cholesky(gram, floor * g_scale)
        scaled = a @ (factor / g_scale**0.5).to(a.dtype)
    values, right = _top(scaled.mT @ scaled, k)
    return values, _orthonormal(scaled @ right, values[:k])


def _top(gram: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues, descending, and the k leading eigenvectors."""
    try:
        values, vectors = eigh_without_outliers(gram)
    except torch.linalg.LinAlgError:
        values, vectors = eigh(gram)  # which has other ways
    return values, vectors[:, :k]


def _cholesky(weight: torch.Tensor, floor: float) -> torch.Tensor:
    """A float64 factor of weight + floor I, or of as little more as makes it positive definite."""
    raised = weight.to(torch.float64, copy=True)
    # A Gram matrix summed from float32 products is indefinite by their rounding, 1e-7 of its mean.
    for factor in (1, 1e2, 1e4):
        raised.diagonal().add_(factor * floor)
        lower, info = torch.linalg.cholesky_ex(raised)
        if not bool(info):
            return lower
    return whiten(raised, form="cholesky").factor


def _orthonormal(columns: torch.Tensor, squared_lengths: torch.Tensor) -> torch.Tensor:
    """Orthonormal Q with span(Q[:, :r]) = span(columns[:, :r]) for every r; the columns are nearly orthogonal.

    Cholesky-QR: after scaling, their Gram matrix is close to the identity, so one Cholesky factor of it
    orthonormalises them to rounding, five times faster than Householder reflections. Where a column
    vanishes (singular values down to zero) it does not apply, and reflections complete the basis.
    """
    lengths = squared_lengths.clamp_min(0).sqrt()
    if bool(lengths[-1] > lengths[0] * torch.finfo(columns.dtype).eps ** 0.5):
        unit = columns / lengths
        lower, info = torch.linalg.cholesky_ex(unit.mT @ unit)
        if not bool(info):
            return torch.linalg.solve_triangular(lower, unit.mT, upper=False).mT
    return qr(columns).q
