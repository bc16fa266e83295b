"""Gram and cross-Gram matrices of a stream of rows: float32 products, float64 sums.

    G = sum_t x_t x_t^T   (n, n)        K = sum_t y_t x_t^T   (p, n)

A float32 sum over millions of tokens loses the small eigenvalues of G, and they are what truncation
is about; a float64 product costs twice as much. So each batch is multiplied in float32, whose error
does not grow with the length of the stream, and added up in float64.
"""

from __future__ import annotations

import torch

__all__ = ["accumulate_cross_gram", "accumulate_gram", "symmetrize"]

# Below this width one product beats two smaller ones and a call (measured on CPU, 4096 rows).
_LEAF = 256


def accumulate_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add X^T X to the upper triangle of ``total`` in place.

    Only blocks on and above the diagonal are multiplied: a recursive split costs ``N n^2`` instead of
    ``2 N n^2`` operations in the limit, 0.56 of them at 8 leaves. Call `symmetrize` after the last batch.

    Args:
        total: (n, n) float64 sum so far; entries below the diagonal blocks are left as they are.
        x: (N, n) rows of this batch, float32 or float64.
    """
    width = x.shape[-1]
    if width <= _LEAF:
        _add(total, x.mT @ x)
        return
    half = (width // 2 + 15) // 16 * 16
    left, right = x[:, :half], x[:, half:]
    accumulate_gram(total[:half, :half], left)
    accumulate_gram(total[half:, half:], right)
    _add(total[:half, half:], left.mT @ right)


def symmetrize(total: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of (n, n) ``total`` onto the lower one in place, and return it.

    Example:
        >>> import torch
        >>> x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
        >>> total = torch.zeros(300, 300, dtype=torch.float64)
        >>> accumulate_gram(total, x)
        >>> bool(torch.allclose(symmetrize(total), (x.T @ x).double(), atol=1e-4))
        True
    """
    size = total.shape[-1]
    # Row panels keep the scratch memory at a fraction of the matrix, which is 1 GB at n = 11008.
    for start in range(0, size, _LEAF):
        stop = min(start + _LEAF, size)
        panel = total[start:stop, start:stop]
        panel.copy_(panel.triu() + panel.triu(1).mT)
        total[stop:, start:stop] = total[start:stop, stop:].mT
    return total


def accumulate_cross_gram(total: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> None:
    """Add Y^T X to ``total`` (p, n) float64 in place, for rows y (N, p) and x (N, n) of one batch."""
    _add(total, y.mT @ x)


def _add(total: torch.Tensor, product: torch.Tensor) -> None:
    """total += product, row panel by row panel: torch would make a float64 copy of the whole product."""
    for start in range(0, total.shape[0], _LEAF):
        total[start : start + _LEAF] += product[start : start + _LEAF]
