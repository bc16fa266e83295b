"""LDU factorisation of a matrix of any shape, whole or truncated.

    a[rows][:, columns] = lower diag(diagonal) upper + remainder,   lower (m, k), diagonal (k,), upper (k, n)

``lower`` is unit lower trapezoidal, ``upper`` unit upper trapezoidal. The first k steps of Gaussian elimination; the
remainder is the Schur complement they leave, zero in the first k rows and columns.

Reference: G. H. Golub and C. F. Van Loan, "Matrix Computations", 4th ed., 2013, sections 3.4 and 4.1; used by Shi et
al., "LoLDU", arXiv:2410.13618, 2024. Different here: an index vector in place of the m x m permutation matrix, and
no division by a vanishing pivot, which gives NaN for a rank-deficient matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ._prepare import prepare, rescale, squared_norm

__all__ = ["LDU", "Pivoting", "ldu"]

Pivoting = Literal["partial", "complete"]
_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # rows, columns, lower, diagonal, upper, error


@dataclass(frozen=True)
class LDU:
    """Factors of a matrix or of a batch of matrices.

    Attributes:
        rows: (..., m) int64, the row of a in each place.
        columns: (..., n) int64, the column of a in each place.
        lower: (..., m, k), ones on the diagonal and zeros above.
        diagonal: (..., k); zero where a has no pivot left.
        upper: (..., k, n), ones on the diagonal and zeros below.
        error: (...,) float64, Frobenius norm of the Schur complement left out.
    """

    rows: Tensor
    columns: Tensor
    lower: Tensor
    diagonal: Tensor
    upper: Tensor
    error: Tensor

    def reconstruct(self) -> Tensor:
        """The product with rows and columns in the order of a, (..., m, n)."""
        product = (self.lower * self.diagonal[..., None, :]) @ self.upper
        rows, columns = self.rows.argsort(dim=-1)[..., None], self.columns.argsort(dim=-1)[..., None, :]
        return product.gather(-2, rows.expand_as(product)).gather(-1, columns.expand_as(product))


def ldu(a: Tensor, rank: int | None = None, *, pivoting: Pivoting = "partial") -> LDU:
    """LDU factorisation, whole or truncated to the first ``rank`` steps of elimination.

        a[rows][:, columns] = lower diag(diagonal) upper + remainder

    "partial" exchanges rows, takes the pivots in the order of the columns and costs O(m n k) in LAPACK. It does NOT
    reveal the rank: its first k terms depend on the order of the columns and may be far from the best. "complete"
    takes the largest entry left, row and column, which truncates well where the singular values fall fast; it passes
    over the whole matrix at each step, several times slower. Neither is good for a slowly falling spectrum: the error
    can exceed the norm of a, where ``rank_revealing_qr`` and ``svd`` truncate with a guarantee. Entries of ``lower``
    are at most 1 in magnitude, with "complete" those of ``upper`` too. Not differentiable.

    Args:
        a: (..., m, n), any float dtype.
        rank: Number k of steps, at most min(m, n); None for all.
        pivoting: "partial": ``columns`` is 0 ... n - 1, unless a pivot vanishes that others in its row do not: such a
            matrix has no factors without a column exchange, and is done again with complete pivoting. "complete":
            stops at max(m, n) * eps times the largest entry, and what is left counts as zero pivots.

    Returns:
        Permutations, factors and error; finite for every input, rank-deficient or zero.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.
        ValueError: Unknown pivoting, rank below 1.

    Example:
        >>> import torch
        >>> result = ldu(torch.tensor([[1.0, 2.0], [4.0, 4.0]]))
        >>> result.rows.tolist(), result.diagonal.tolist()
        ([1, 0], [4.0, 1.0])
        >>> result.lower.tolist(), result.upper.tolist()
        ([[1.0, 0.0], [0.25, 1.0]], [[1.0, 1.0], [0.0, 1.0]])

    Reference:
        Golub and Van Loan (2013), Algorithms 3.4.1 and 3.4.3.
    """
    if pivoting not in get_args(Pivoting):
        raise ValueError(f"pivoting must be one of {', '.join(get_args(Pivoting))}, not {pivoting!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}; leave it out for all steps")
    work, scale, _ = prepare(a)
    count = min(*work.shape[-2:], rank or max(work.shape[-2:]))
    batch, flat = work.shape[:-2], work.reshape(work.shape[:-2].numel(), *work.shape[-2:])
    if pivoting == "partial":
        parts, failed = _partial(flat, count)
        again = failed.nonzero()[:, 0].tolist()
    else:
        parts, again = _empty(flat, count), list(range(flat.shape[0]))
    for index in again:
        for part, value in zip(parts, _complete(flat[index], count), strict=True):
            part[index] = value
    rows, columns, lower, diagonal, upper, error = (p.reshape(batch + p.shape[1:]) for p in parts)
    return LDU(rows, columns, lower, rescale(diagonal, scale, "diagonal"), upper, error * scale)


def _partial(a: Tensor, count: int) -> tuple[_Parts, Tensor]:
    """Elimination with row exchanges of a (b, m, n), and which of the matrices it cannot do, (b,)."""
    size, m, n = a.shape
    packed, transpositions, _ = torch.linalg.lu_factor_ex(a[..., :count])  # no later column matters for the pivots
    order = [_order(swaps, m) for swaps in transpositions.tolist()]
    rows = torch.tensor(order, dtype=torch.int64, device=a.device).reshape(size, m)
    columns = torch.arange(n, device=a.device).expand(size, n).clone()
    lower = packed.tril(-1)
    lower.diagonal(dim1=-2, dim2=-1).fill_(1)
    others = a[..., count:].gather(-2, rows[..., None].expand(size, m, n - count))
    top, rest = others[:, :count], others[:, count:]
    top = torch.linalg.solve_triangular(lower[:, :count], top, upper=False, unitriangular=True)
    upper = torch.cat([packed[:, :count].triu(), top], dim=-1)
    error = squared_norm(rest - lower[:, count:] @ top).sqrt()
    diagonal = upper.diagonal(dim1=-2, dim2=-1).clone()
    largest = upper.abs().amax(dim=-1) if n else diagonal
    failed = (diagonal.abs() < torch.finfo(a.dtype).eps * largest).any(dim=-1)
    upper = upper / torch.where(diagonal == 0, 1, diagonal)[..., None]
    upper.diagonal(dim1=-2, dim2=-1).fill_(1)
    return (rows, columns, lower, diagonal, upper, error), failed


def _complete(a: Tensor, count: int) -> _Parts:
    """Elimination with row and column exchanges of one a (m, n)."""
    work, (m, n) = a.clone(), a.shape
    rows, columns = torch.arange(m, device=a.device), torch.arange(n, device=a.device)
    floor, done = 0.0, count
    for step in range(count):
        left = work[step:, step:]
        row = int(torch.maximum(left.amax(dim=1), -left.amin(dim=1)).argmax())  # several times faster than abs()
        column = int(left[row].abs().argmax())
        pivot = float(left[row, column])
        if step == 0:
            floor = max(m, n) * torch.finfo(a.dtype).eps * abs(pivot)
        if abs(pivot) <= floor:
            done = step
            break
        for index, vectors, other in ((rows, work, row), (columns, work.mT, column)):
            pair, turned = [step, step + other], [step + other, step]
            index[pair], vectors[pair] = index[turned], vectors[turned]
        left[1:, 0] /= pivot
        left[1:, 1:].addr_(left[1:, 0], left[0, 1:], alpha=-1)
    error = squared_norm(work[done:, done:]).sqrt()
    work[done:, done:] = 0
    lower, upper = work[:, :count].tril(-1), work[:count].triu()
    diagonal = upper.diagonal().clone()
    upper = upper / torch.where(diagonal == 0, 1, diagonal)[:, None]
    for part in (lower, upper):
        part.diagonal().fill_(1)
    return rows, columns, lower, diagonal, upper, error


def _empty(a: Tensor, count: int) -> _Parts:
    size, m, n = a.shape
    index = a.new_empty(size, m, dtype=torch.int64), a.new_empty(size, n, dtype=torch.int64)
    factors = a.new_empty(size, m, count), a.new_empty(size, count), a.new_empty(size, count, n)
    return *index, *factors, a.new_empty(size, dtype=torch.float64)


def _order(transpositions: list[int], m: int) -> list[int]:
    """The permutation that LAPACK's successive transpositions, counted from 1, amount to."""
    order = list(range(m))
    for i, j in enumerate(transpositions):
        order[i], order[j - 1] = order[j - 1], order[i]
    return order
