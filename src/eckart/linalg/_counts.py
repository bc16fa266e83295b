"""What a rank costs: numbers stored by the two forms of a factored matrix.

plain    W = up @ down                                       k (m + n)
pivoted  k rows of W, the others combinations of them        k (m + n - k)
"""

from __future__ import annotations

import math
from typing import Literal, get_args

__all__ = [
    "Form",
    "break_even_rank",
    "check_form",
    "check_ratio",
    "num_parameters",
    "rank_for_parameters",
    "rank_for_ratio",
]

Form = Literal["plain", "pivoted"]


def num_parameters(m: int, n: int, rank: int, form: Form = "pivoted") -> int:
    """Numbers in an m x n matrix of the given rank, stored in ``form``; index tensors not counted.

    Args:
        m: Rows.
        n: Columns.
        rank: 0 <= rank <= min(m, n).
        form: "plain" k (m + n), or "pivoted" k (m + n - k).

    Raises:
        ValueError: rank out of range, unknown form.

    Example:
        >>> num_parameters(100, 50, 10, "plain"), num_parameters(100, 50, 10, "pivoted")
        (1500, 1400)

    Reference:
        Zhao et al., "Pivoting Factorization", ICML 2025, arXiv:2501.19090, for the pivoted form.
    """
    check_form(form)
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} is outside 0 to {min(m, n)}, the largest rank of a {m} x {n} matrix")
    return rank * (m + n) if form == "plain" else rank * (m + n - rank)


def break_even_rank(m: int, n: int, form: Form = "pivoted") -> int:
    """Smallest rank at which the factored form has no fewer numbers than the dense matrix.

    Example:
        >>> break_even_rank(100, 50, "plain"), break_even_rank(100, 50, "pivoted")
        (34, 50)
    """
    check_form(form)
    return -(-m * n // (m + n)) if form == "plain" and m + n > 0 else min(m, n)


def rank_for_parameters(m: int, n: int, parameters: int, form: Form = "pivoted") -> int:
    """Largest rank whose factored form has at most ``parameters`` numbers, at most min(m, n).

    Example:
        >>> rank_for_parameters(100, 50, 1450, "plain"), rank_for_parameters(100, 50, 1450, "pivoted")
        (9, 10)
    """
    check_form(form)
    total = m + n
    if parameters <= 0 or total == 0:
        return 0
    if form == "plain":
        return min(parameters // total, m, n)
    # k (m + n - k) <= p  <=>  m + n - 2 k >= sqrt((m + n)^2 - 4 p), in integers so that nothing is rounded up.
    square = total * total - 4 * parameters
    if square <= 0:
        return min(m, n)
    root = math.isqrt(square - 1) + 1  # ceiling of the square root
    return max(0, min((total - root) // 2, m, n))


def rank_for_ratio(m: int, n: int, ratio: float, form: Form = "pivoted") -> int:
    """Largest rank that removes at least the fraction ``ratio`` of an m x n matrix's numbers.

        parameters(rank) <= (1 - ratio) m n

    Args:
        m: Rows.
        n: Columns.
        ratio: Fraction REMOVED, in (0, 1).
        form: "plain" or "pivoted".

    Returns:
        The rank; 0 if not even rank one is small enough.

    Raises:
        ValueError: ratio outside (0, 1), unknown form.

    Example:
        >>> rank_for_ratio(576, 576, 0.2, "plain"), rank_for_ratio(576, 576, 0.2, "pivoted")
        (230, 318)
    """
    check_ratio(ratio)
    return rank_for_parameters(m, n, math.floor((1 - ratio) * (m * n)), form)


def check_form(form: str) -> None:
    """Raises ValueError for an unknown form."""
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, not {form!r}")


def check_ratio(ratio: float) -> None:
    """Raises ValueError for a ratio outside (0, 1)."""
    if not 0 < ratio < 1:
        raise ValueError(f"ratio is the fraction of parameters removed and lies between 0 and 1, not {ratio}")
