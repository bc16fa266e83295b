"""Least squares, positive semidefinite systems, and QR."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._prepare import prepare, rescale, result_dtype
from .eigh import eigh, symmetric_part
from .errors import LinalgError
from .svd import svd
from .whiten import NEGATIVE

__all__ = ["QR", "lstsq", "qr", "solve_spd"]


class QR(NamedTuple):
    """Reduced QR factors: q (..., m, k) with orthonormal columns, r (..., k, n) upper triangular, k = min(m, n)."""

    q: Tensor
    r: Tensor


def qr(a: Tensor) -> QR:
    """Reduced QR factorisation with a nonnegative diagonal of r, which makes it unique at full rank.

        a = q r,   qᵀ q = I

    Householder reflections in the input's dtype (half precision in float32), O(m n k); q is orthonormal for a of any
    rank. Not differentiable.

    Args:
        a: (..., m, n), any float dtype.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.

    Example:
        >>> import torch
        >>> q, r = qr(torch.tensor([[0.0, 1.0], [-2.0, 0.0]]))
        >>> r.tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """
    work, scale, _ = prepare(a)
    q, r = torch.linalg.qr(work)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -torch.ones_like(diagonal), torch.ones_like(diagonal))
    # `+ 0` turns the negative zeros below the diagonal into zeros.
    return QR(q * signs[..., None, :], rescale(r * signs[..., None], scale, "r") + 0)


def lstsq(a: Tensor, b: Tensor, *, ridge: float = 0.0) -> Tensor:
    """Least squares of smallest norm, for a of any shape and rank.

        min over x of ||a x - b||_F^2 + ridge * mean(diag aᵀa) * ||x||_F^2

    Through the thin SVD in float64; singular values below max(m, n) * eps * s_1 (eps of the input's dtype) count as
    zero. O(m n min(m, n)). For many more rows than columns, ``solve_spd`` on the Gram is cheaper.

    Args:
        a: (..., m, n), any float dtype.
        b: (..., m, p).
        ridge: Tikhonov parameter in units of the mean diagonal of aᵀa, so that it does not depend on the scale of a.

    Returns:
        x (..., n, p), in float64 if a or b is, else float32.

    Raises:
        LinalgError: Shapes that do not fit, NaN or Inf.
        ValueError: ridge negative.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0], [1.0]])
        >>> lstsq(a, torch.tensor([[1.0], [3.0]])).tolist()
        [[2.0]]
    """
    _check_ridge(ridge)
    dtype, eps = result_dtype(a, b), torch.finfo(result_dtype(a)).eps
    work, a_scale, energy = prepare(a, dtype=torch.float64)
    right, b_scale = _right_side(b, work, "a")
    u, s, vh, _ = svd(work, driver="exact")
    penalty = ridge * energy[..., None] / max(1, work.shape[-1])
    wanted = s > max(work.shape[-2:]) * eps * s[..., :1]
    filters = torch.where(wanted, s / torch.where(wanted, s.square() + penalty, 1), 0)
    x = vh.mT @ (filters[..., None] * (u.mT @ right))
    return rescale(x, b_scale / a_scale, "x", dtype)


def solve_spd(gram: Tensor, rhs: Tensor, *, ridge: float = 0.0) -> Tensor:
    """Solution of a positive semidefinite system, of smallest norm where the matrix is singular.

        (gram + ridge * mean(diag gram) * I) x = rhs

    Cholesky in float64, O(n^3 / 3); where the matrix is singular to working precision (its pivots span more than
    1 / (n * eps), eps of the input's dtype) the eigenvectors of the numerical null space are left out instead, so x
    minimises ||gram x - rhs||. A zero matrix gives zero.

    Args:
        gram: (..., n, n) symmetric positive semidefinite, any float dtype.
        rhs: (..., n, p).
        ridge: Added to the diagonal, in units of its mean.

    Returns:
        x (..., n, p), in float64 if gram or rhs is, else float32.

    Raises:
        LinalgError: Not symmetric positive semidefinite, shapes that do not fit, NaN or Inf.
        ValueError: ridge negative.

    Example:
        >>> import torch
        >>> solve_spd(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[8.0], [0.0]])).tolist()
        [[2.0], [0.0]]
    """
    _check_ridge(ridge)
    dtype, eps = result_dtype(gram, rhs), torch.finfo(result_dtype(gram)).eps
    work, gram_scale, _ = prepare(gram, "gram", dtype=torch.float64, square=True)
    right, rhs_scale = _right_side(rhs, work, "gram")
    work = symmetric_part(work, "gram")
    size = work.shape[-1]
    if ridge > 0:
        mean = work.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
        work = work + ridge * mean * torch.eye(size, dtype=work.dtype, device=work.device)
    lower, info = torch.linalg.cholesky_ex(work)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    if size and not bool(info.any()) and bool((pivots.amin(dim=-1) > size * eps * pivots.amax(dim=-1)).all()):
        x = torch.cholesky_solve(right, lower)
    else:
        x = _pseudo_solve(work, right, size * eps)
    return rescale(x, rhs_scale / gram_scale, "x", dtype)


def _pseudo_solve(gram: Tensor, right: Tensor, cutoff: float) -> Tensor:
    values, vectors = eigh(gram)
    if bool((values < -NEGATIVE * values[..., :1].abs()).any()):
        raise LinalgError.about("gram", gram, "is not positive semidefinite", "give a Gram matrix such as x.T @ x")
    wanted = values > cutoff * values[..., :1]
    inverse = torch.where(wanted, 1 / torch.where(wanted, values, 1), 0)
    return vectors @ (inverse[..., None] * (vectors.mT @ right))


def _right_side(b: Tensor, a: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if b.ndim < 2 or b.shape[-2] != a.shape[-2] or b.shape[:-2] != a.shape[:-2]:
        raise LinalgError.about(
            "right-hand side", b, f"does not fit {name} of shape {tuple(a.shape)}", "give as many rows, the same batch"
        )
    work, scale, _ = prepare(b, "right-hand side", dtype=torch.float64)
    return work, scale


def _check_ridge(ridge: float) -> None:
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be a number of at least 0, not {ridge}")
