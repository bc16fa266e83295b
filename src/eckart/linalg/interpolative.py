"""Row interpolation: k rows of a matrix from which all its other rows follow with small coefficients.

    basis[rest] = combination @ basis[kept],   basis (m, k), kept (k,), rest (m - k,), combination (m - k, k)

The kept rows span a submatrix of locally maximal volume: no exchange of one kept row for another raises
``|det basis[kept]|`` by more than ``bound``, which is the same as ``max |combination| <= bound``.

Reference: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov, Zamarashkin, "How to find a good submatrix", in
Matrix Methods: Theory, Algorithms and Applications, World Scientific, 2010 (the maxvol algorithm).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._prepare import prepare
from .errors import LinalgError

__all__ = ["RowPivots", "pivot_rows"]

# Rank-one exchanges between two fresh solves. One exchange loses about one unit of float64 rounding times the
# size of the entries, so a few dozen of them stay far below any storage precision.
_EXCHANGES_PER_SOLVE = 32


@dataclass(frozen=True)
class RowPivots:
    """Kept rows of a matrix and the coefficients that give the other rows.

    Attributes:
        kept: Indices of the k kept rows, (k,) int64.
        rest: Indices of the other rows, ascending order not promised, (m - k,) int64.
        combination: Coefficients with ``basis[rest] = combination @ basis[kept]``, (m - k, k) float64.
    """

    kept: Tensor
    rest: Tensor
    combination: Tensor


def pivot_rows(basis: Tensor, *, bound: float = 2.0) -> RowPivots:
    """Choose k rows of a tall matrix so that every other row is a small combination of them.

        basis[rest] = combination @ basis[kept],   max |combination| <= bound

    The start is a partially pivoted LU, ``basis[order] = L U``. The combination depends on the column space
    alone, so the unit lower trapezoidal ``L`` (m, k) takes the place of ``basis`` from here on: it is well
    conditioned in practice, does not change with the scaling of the columns (singular values over many decades
    do no harm) and keeps full rank when ``basis`` loses it. Then, while an entry exceeds ``bound``, its two rows
    are exchanged by a rank-one update (maxvol). Usually none to a few exchanges are needed.

    Costs m k^2 multiply-adds for LU and solve, and m k for each exchange, in float64. Accurate to a small
    multiple of the float64 rounding of each column. A rank-deficient or zero ``basis`` is no special case: the
    equation still holds, only the choice of rows is not unique.

    Args:
        basis: Matrix (m, k), m >= k, any float dtype, any scale. Not batched: the pivots depend on the values.
        bound: Largest absolute entry of the combination, above 1. The default 2 is that of strong
            rank-revealing factorizations; nearer to 1 costs more exchanges for little gain.

    Returns:
        The kept rows, the other rows and the combination, on the device of ``basis``.

    Raises:
        LinalgError: ``basis`` is no matrix, has more columns than rows or holds NaN or Inf.
        ValueError: ``bound`` is not above 1.

    Example:
        >>> basis = torch.tensor([[1.0, 0.0], [4.0, 2.0], [0.0, 2.0]])
        >>> pivots = pivot_rows(basis)
        >>> pivots.kept.tolist(), pivots.rest.tolist(), pivots.combination.tolist()
        ([1, 2], [0], [[0.25, -0.25]])
    """
    if not bound > 1:
        raise ValueError(f"bound must be above 1, got {bound}: at 1 two equally good rows can alternate forever")
    if basis.ndim != 2 or basis.shape[0] < basis.shape[1]:
        raise LinalgError.about(
            "basis", basis, "is not one matrix with at least as many rows as columns", "reduce its rank first"
        )
    k = basis.shape[1]
    lower, order = _unit_lower(prepare(basis, "basis", dtype=torch.float64).matrix)
    combination = torch.linalg.solve_triangular(
        lower[order[:k]], lower[order[k:]], upper=False, left=False, unitriangular=True
    )
    # Every round but the last multiplies the volume by more than `bound`, so the loop ends; the limit only
    # guards against rounding at the bound itself.
    for _ in range(k + 16):
        if not _exchange(order, combination, bound):
            return RowPivots(order[:k], order[k:], combination)
        combination = torch.linalg.solve(lower[order[:k]], lower[order[k:]], left=False)
    raise LinalgError.about("basis", basis, f"no {k} rows found that combine within {bound}", "raise bound")


def _unit_lower(basis: Tensor) -> tuple[Tensor, Tensor]:
    """LU with row pivoting: ``L`` (m, k) in the order of the basis rows, and all rows (m,), pivots first."""
    packed, transpositions, _ = torch.linalg.lu_factor_ex(basis)
    # LAPACK records the pivots as successive transpositions, counted from 1.
    order = list(range(basis.shape[0]))
    for i, j in enumerate((transpositions - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    rows = torch.tensor(order, dtype=torch.int64, device=basis.device)
    unit_lower = packed.tril(-1)
    unit_lower.diagonal().fill_(1)
    lower = torch.empty_like(unit_lower)
    lower[rows] = unit_lower
    return lower, rows


def _exchange(order: Tensor, combination: Tensor, bound: float) -> int:
    """Exchange rows, in place, while an entry exceeds ``bound``; at most ``_EXCHANGES_PER_SOLVE`` of them.

    With i the row and j the column of the largest entry c_ij, the old kept row j takes place i of the rest, and
    C <- C - C[:, j] (c_i - e_j)^T / c_ij, where row i of C first becomes e_j.
    """
    k = combination.shape[1]
    if combination.numel() == 0:
        return 0
    for count in range(_EXCHANGES_PER_SOLVE):
        i, j = divmod(int(combination.abs().argmax()), k)
        largest = float(combination[i, j])
        if abs(largest) <= bound:
            return count
        row = combination[i].clone()
        row[j] -= 1
        combination[i] = 0
        combination[i, j] = 1
        combination.addr_(combination[:, j].clone(), row, alpha=-1 / largest)
        order[[j, k + i]] = order[[k + i, j]]
    return _EXCHANGES_PER_SOLVE
