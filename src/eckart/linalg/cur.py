"""Approximations made of a matrix's own columns and rows, which keep their meaning, sign and sparsity.

    a ~ a[:, J] t                  interpolative decomposition,  t (k, n) holds the identity at J
    a ~ c u r                      CUR: c = a[:, J] (m, k), r = a[I] (k, n), a small core u (k, k)
    a b ~ sum_t a_(:, j_t) b_(j_t, :) w_t       column-row (CR) product of a (m, p) and b (p, n)

Reference: H. Cheng, Z. Gimbutas, P.-G. Martinsson and V. Rokhlin, "On the compression of low rank matrices", SIAM J.
Sci. Comput. 26 (2005); Goreinov, Tyrtyshnikov and Zamarashkin, "A theory of pseudoskeleton approximations", Linear
Algebra Appl. 261 (1997); Mahoney and Drineas, "CUR matrix decompositions for improved data analysis", PNAS 106
(2009); Drineas, Kannan and Mahoney, "Fast Monte Carlo algorithms for matrices I", SIAM J. Comput. 36 (2006). Different
here: pivots are those of a strong rank-revealing QR, and rows are chosen within the chosen columns, which keeps their
intersection well conditioned: with rows chosen from a on their own, the core u = a[I, J]^-1 made the error up to ten
times larger in our tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ._basis import orthonormalize
from ._prepare import prepare, rescale, squared_norm
from .errors import LinalgError
from .interpolative import pivot_rows
from .leverage import leverage_scores
from .rank_revealing import rank_revealing_qr
from .svd import svd

__all__ = ["CUR", "CURCore", "CURSelection", "Interpolative", "InterpolativeSide", "cur", "interpolative", "skeleton"]

InterpolativeSide = Literal["columns", "rows"]
CURSelection = Literal["pivot", "leverage", "random"]
CURCore = Literal["optimal", "intersection"]
_ROWS = 256  # of the residual at a time
_CUTOFF = 10.0


@dataclass(frozen=True)
class Interpolative:
    """Chosen columns (or rows) of a matrix, and all of it as their combinations.

    Attributes:
        indices: (k,) int64, the chosen columns or rows.
        skeleton: a[:, indices] (m, k), or a[indices] (k, n).
        coefficients: (k, n) with the identity in the columns ``indices``; for rows (m, k), identity in those rows.
        side: "columns": a ~ skeleton @ coefficients. "rows": a ~ coefficients @ skeleton.
        error: float64 scalar, Frobenius norm of what is left.
    """

    indices: Tensor
    skeleton: Tensor
    coefficients: Tensor
    side: InterpolativeSide
    error: Tensor

    def reconstruct(self) -> Tensor:
        """The product, (m, n)."""
        left, right = (self.skeleton, self.coefficients)[:: 1 if self.side == "columns" else -1]
        return left @ right


@dataclass(frozen=True)
class CUR:
    """Columns and rows of a matrix and the core between them.

    Attributes:
        c: a[:, columns], (m, k).
        u: (k, l) float64: it carries the inverse of a's singular values, which float32 cannot.
        r: a[rows], (l, n).
        columns: (k,) int64.
        rows: (l,) int64.
        error: float64 scalar, Frobenius norm of ``a - c u r``.
    """

    c: Tensor
    u: Tensor
    r: Tensor
    columns: Tensor
    rows: Tensor
    error: Tensor

    def reconstruct(self) -> Tensor:
        """c u r, (m, n)."""
        return (self.c.to(torch.float64) @ self.u).to(self.c.dtype) @ self.r


def interpolative(
    a: Tensor,
    rank: int | None = None,
    side: InterpolativeSide = "columns",
    *,
    bound: float = 2.0,
    generator: torch.Generator | None = None,
) -> Interpolative:
    """Interpolative decomposition: k columns (rows) of a matrix, and coefficients that give all the others.

        a ~ a[:, J] t,   t[:, J] = I,   max |t| <= bound        (rows: a ~ t a[J])

    The error is at most sqrt(1 + bound^2 k (n - k)) times the best possible one for rank k, in practice 1.1 to 2.5
    times. One strong rank-revealing QR, O(m n k). Not differentiable. Not batched.

    Args:
        a: (m, n), any float dtype.
        rank: Largest number k of columns (rows), fewer where a has fewer independent ones; None for the numerical
            rank.
        side: "columns" or "rows".
        bound: Largest coefficient, above 1.
        generator: Source of the sketch behind the pivots; None for a private one with a fixed seed.

    Returns:
        Indices, columns or rows, coefficients and error.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not one float matrix.
        ValueError: Unknown side, rank below 1, bound not above 1.

    Example:
        >>> result = interpolative(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]]))
        >>> result.indices.tolist(), result.coefficients.tolist()
        ([2, 1], [[0.0, 0.0, 1.0], [0.5, 1.0, 0.0]])

    Reference:
        Cheng, Gimbutas, Martinsson and Rokhlin (2005).
    """
    if side not in get_args(InterpolativeSide):
        raise ValueError(f"side must be one of {', '.join(get_args(InterpolativeSide))}, not {side!r}")
    if a.ndim == 2 and side == "rows":
        turned = interpolative(a.mT, rank, bound=bound, generator=generator)
        return Interpolative(turned.indices, turned.skeleton.mT, turned.coefficients.mT, side, turned.error)
    factored = rank_revealing_qr(a, rank, bound=bound, generator=generator)
    indices, dtype = factored.columns, factored.r.dtype
    coefficients = factored.coefficients.new_zeros(factored.r.shape)
    coefficients[:, indices] = torch.eye(factored.rank, dtype=torch.float64, device=a.device)
    coefficients[:, factored.permutation[factored.rank :]] = factored.coefficients
    return Interpolative(indices, a.detach()[:, indices].to(dtype), coefficients.to(dtype), side, factored.error)


def cur(
    a: Tensor,
    rank: int,
    *,
    select: CURSelection = "pivot",
    core: CURCore = "optimal",
    generator: torch.Generator | None = None,
) -> CUR:
    """CUR decomposition: a matrix from ``rank`` of its own columns and rows.

        a ~ c u r,   c = a[:, J] (m, k),   u (k, k),   r = a[I] (k, n)

    With pivots the error is at most sqrt((1 + 4 k (m - k)) (1 + 4 k (n - k))) times the best possible one for rank k;
    in practice 1.1 to 2.5 times with the optimal core and 1.5 to 4 times with the intersection. Sampling is worse, and
    unbounded for a given draw; its use is statistics. O(m n k). Not differentiable. Not batched.

    Args:
        a: (m, n), any float dtype.
        rank: Number k of columns and of rows; fewer with pivots where a has fewer independent ones.
        select: "pivot": columns by strong rank-revealing QR, rows by ``pivot_rows`` within them. "leverage": drawn
            without replacement with the leverage scores of rank k as probabilities. "random": uniform, without
            replacement.
        core: "optimal": u = c⁺ a r⁺, the one of smallest error. "intersection": u = a[I, J]⁺, which needs no product
            with a.
        generator: Source of the sketch or the draw; None for a private one with a fixed seed.

    Returns:
        Columns, core, rows, their indices and the error.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not one float matrix.
        ValueError: Unknown select or core, rank below 1.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> result = cur(a, 1)
        >>> result.columns.tolist(), result.rows.tolist(), torch.allclose(result.reconstruct(), a)
        ([1], [1], True)

    Reference:
        Goreinov, Tyrtyshnikov and Zamarashkin (1997); Mahoney and Drineas (2009).
    """
    if select not in get_args(CURSelection):
        raise ValueError(f"select must be one of {', '.join(get_args(CURSelection))}, not {select!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    _check_core(core)
    _check_matrix(a)
    matrix = prepare(a).matrix
    if generator is None:
        generator = torch.Generator(device=a.device).manual_seed(0)
    if select == "pivot":
        factored = rank_revealing_qr(matrix, rank, generator=generator)
        columns, rows = factored.columns, pivot_rows(factored.q).kept
    else:
        rank = min(rank, *matrix.shape)
        if select == "leverage":
            left, _, right, _ = svd(matrix, rank, generator=generator)
            weights = [leverage_scores(left), leverage_scores(right.mT)]
        else:
            weights = [torch.ones(size, device=a.device) for size in matrix.shape]
        rows, columns = (torch.multinomial(weight, rank, generator=generator) for weight in weights)
    return skeleton(a, rows, columns, core=core)


def skeleton(a: Tensor, rows: Tensor, columns: Tensor, *, core: CURCore = "intersection") -> CUR:
    """CUR decomposition with given rows and columns: the (pseudo)skeleton, or general Nyström, approximation.

        a ~ a[:, J] u a[I]

    With the intersection as core and ``a[I, J]`` of the rank of a it is exact. NLoRA's initial factors come from the
    leading rows and columns, I = J = 0 ... k - 1; for those the intersection is often badly conditioned, and the error
    can be far larger than a itself: look at ``error``. O(m n k). Not differentiable. Not batched.

    Args:
        a: (m, n), any float dtype.
        rows: I, (l,) int64.
        columns: J, (k,) int64.
        core: "intersection": u = a[I, J]⁺, singular values below 10 max(k, l) * eps of the largest count as
            zero. "optimal": u = c⁺ a r⁺, the one of smallest error.

    Returns:
        Columns, core, rows, their indices and the error.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not one float matrix.
        ValueError: Unknown core.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> skeleton(a, rows=torch.tensor([0]), columns=torch.tensor([0])).u.tolist()
        [[1.0]]

    Reference:
        Goreinov, Tyrtyshnikov and Zamarashkin (1997).
    """
    _check_core(core)
    _check_matrix(a)
    matrix, scale, _ = prepare(a)
    c, r = matrix[:, columns], matrix[rows]
    if core == "optimal":
        # c = q_c r_c gives c⁺ = r_c⁺ q_cᵀ for c of any rank, so only small matrices need a pseudo-inverse.
        q_c, r_c = orthonormalize(c)
        q_r, r_r = orthonormalize(r.mT)
        middle = (q_c.mT @ matrix @ q_r).to(torch.float64)
        u = _pseudo_solve(r_c, _pseudo_solve(r_r, middle.mT).mT)
    else:
        inner = c[rows].to(torch.float64)
        u = _pseudo_solve(inner, torch.eye(rows.numel(), dtype=inner.dtype, device=a.device), matrix.dtype)
    left = (c.to(torch.float64) @ u).to(matrix.dtype)
    parts = zip(matrix.split(_ROWS), left.split(_ROWS), strict=True)
    error = torch.stack([squared_norm(x - y @ r) for x, y in parts]).sum().sqrt()
    c, r = (rescale(part, scale, "a") for part in (c, r))
    return CUR(c, rescale(u, 1 / scale, "u"), r, columns, rows, error * scale)


def _pseudo_solve(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """a⁺ b for a small float64 matrix whose entries carry the rounding of ``dtype``.

    ``lstsq`` counts singular values above max(m, n) * eps, which for two or three equal columns is not always enough.
    """
    u, s, vh, _ = svd(a, driver="exact")
    wanted = s > _CUTOFF * max(a.shape) * torch.finfo(dtype).eps * s[:1]
    return vh.mT @ (torch.where(wanted, 1 / torch.where(wanted, s, 1), 0)[:, None] * (u.mT @ b))


def _check_core(core: str) -> None:
    if core not in get_args(CURCore):
        raise ValueError(f"core must be one of {', '.join(get_args(CURCore))}, not {core!r}")


def _check_matrix(a: Tensor) -> None:
    if a.numel() == 0:
        raise LinalgError.about("a", a, "is empty", "give at least one row and column")
    if a.ndim > 2:
        raise LinalgError.about("a", a, "is a batch", "call this for each matrix: the choice depends on the values")
