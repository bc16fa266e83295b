"""A product of two factors, G = D^T X, looked at without being formed where its inner dimension is the smallest."""

from __future__ import annotations

from torch import Tensor

from .solve import qr
from .svd import singular_values

__all__ = ["product_cosine", "product_singular_values"]


def product_singular_values(d: Tensor, x: Tensor) -> Tensor:
    """Singular values of G = D^T X, a sum of T outer products.

        T < min(m, n):  D^T = Q_1 R_1,  X^T = Q_2 R_2,  and they are those of the core R_1 R_2^T (T, T)

    O(T^2 (m + n) + T^3); for larger T the product is formed, O(T m n). Rows of zeros in D are left out first.

    Args:
        d: (T, m), any float dtype.
        x: (T, n).

    Returns:
        (min(T, m, n),) float64, descending, where T counts the rows of D that are not zero.

    Raises:
        LinalgError: NaN or Inf in one of the two.

    Example:
        >>> import torch
        >>> product_singular_values(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0]])).tolist()
        [6.0]
    """
    kept = d.ne(0).any(dim=1)  # true for NaN as well
    d, x = d[kept], x[kept]
    if len(d) >= min(d.shape[1], x.shape[1]):
        return singular_values(d.mT @ x)
    return singular_values(qr(d.mT).r @ qr(x.mT).r.mT)


def product_cosine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float | None:
    """Cosine of the angle between two products as vectors, through the smallest of the matrices that give it.

        <D_1^T X_1, D_2^T X_2> = sum (D_1 D_2^T) * (X_1 X_2^T)

    Args:
        first: D_1 (T_1, m) and X_1 (T_1, n).
        second: D_2 (T_2, m) and X_2 (T_2, n).

    Returns:
        Between -1 and 1; None for products of different shapes, or if one is zero.

    Example:
        >>> import torch
        >>> one = torch.eye(2), torch.eye(2)
        >>> round(product_cosine(one, (torch.ones(1, 2), torch.ones(1, 2))), 4)  # 2 / (sqrt 2 * 2)
        0.7071
    """
    if any(a.shape[1] != b.shape[1] for a, b in zip(first, second, strict=True)):
        return None
    norms = _inner(first, first) * _inner(second, second)
    return max(-1.0, min(1.0, _inner(first, second) / norms**0.5)) if norms > 0 else None


def _inner(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    (d1, x1), (d2, x2) = first, second
    if max(len(d1), len(d2)) < min(d1.shape[1], x1.shape[1]):
        return float(((d1 @ d2.mT).double() * (x1 @ x2.mT).double()).sum())
    return float(((d1.mT @ x1).double() * (d2.mT @ x2).double()).sum())
