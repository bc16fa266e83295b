"""Singular values alone: through the eigenvalues of the smaller Gram matrix, as exactly as is asked for.

    s_i(A)^2 = λ_i(AᵀA)

An error E in the Gram matrix or in its eigenvalues moves s_i by ||E|| / (2 s_i): nothing beside the large ones, much
for the small. So a cheap Gram matrix comes first, and a better one where the smallest eigenvalue is too close to E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._prepare import prepare, rescale
from .gram import accumulate_gram

__all__ = ["singular_values"]

_GRAM_FROM = 64  # min(m, n) from which the Gram matrix pays
_PANEL = 2048  # rows of the longer side that are in float64 at once
_SAMPLE = 4  # columns on which the error of a Gram matrix in float32 is measured
_EPS = torch.finfo(torch.float64).eps


def singular_values(a: Tensor, *, rtol: float | None = None) -> Tensor:
    """All singular values of a (..., m, n), descending, (..., min(m, n)) float64.

    float32 and half precision go through the eigenvalues of the smaller Gram matrix in float64 (two to eight times
    as fast, error 1e-8 * s_1, below that of gesdd in float32); float64 goes through LAPACK, error 2e-16 * s_1.

    Args:
        a: Any float dtype.
        rtol: Relative error allowed in every value, however small it is beside s_1. With 1e-4 a well-conditioned
            float32 matrix, twice as long as wide or more, has its Gram matrix multiplied in float32, and a matrix with
            values below about 5e-6 * s_1 goes through LAPACK in float64.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.

    Example:
        >>> import torch
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).tolist()
        [4.0, 3.0]
    """
    work, scale, _ = prepare(a)
    if work.dtype == torch.float64 or min(work.shape[-2:]) < _GRAM_FROM:
        s = torch.linalg.svdvals(work.to(torch.float64))
    else:
        rows = work if work.shape[-2] >= work.shape[-1] else work.mT
        s = _through_gram(rows) if rtol is None else _to_accuracy(rows, rtol)
    return rescale(s, scale, "singular values")


def _through_gram(rows: Tensor) -> Tensor:
    return _eigenvalues(_gram(rows, torch.float64)).clamp(min=0).sqrt()


def _to_accuracy(rows: Tensor, rtol: float) -> Tensor:
    """Singular values of float32 rows (..., N, n), N >= n, each to ``rtol`` of itself."""
    size = rows.shape[-1]
    # A square matrix is hardly ever so well-conditioned that the first try would do.
    for dtype in (torch.float32, torch.float64) if rows.shape[-2] >= 2 * size else (torch.float64,):
        total = _gram(rows, dtype)
        error = _mend(total, rows) if dtype == torch.float32 else 0
        values = _eigenvalues(total)
        # Small eigenvalues are off by less than a quarter of this, whatever the spectrum (measured).
        doubt = size**0.5 * _EPS * values[..., 0] + error
        if bool((doubt <= 2 * rtol * values[..., -1]).all()):
            return values.sqrt()
        del total
    return _exact(rows)


def _gram(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Upper triangle of rowsᵀ rows (..., n, n) in float64, multiplied in ``dtype``, without a copy of all rows."""
    total = rows.new_zeros(*rows.shape[:-2], rows.shape[-1], rows.shape[-1], dtype=torch.float64)
    matrices = zip(total.view(-1, *total.shape[-2:]), rows.reshape(-1, *rows.shape[-2:]), strict=True)
    for sum_of_one, one in matrices:
        for part in one.split(_PANEL):
            accumulate_gram(sum_of_one, part.to(dtype))
    return total


def _eigenvalues(total: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix given by its upper triangle, descending."""
    return torch.linalg.eigvalsh(total, UPLO="U").flip(-1)


def _mend(total: Tensor, rows: Tensor) -> Tensor:
    """Make the diagonal of ``total`` (..., n, n) exact, the largest error of a product in float32; norm of the rest.

    The error of any other entry is random, of size σ d_i d_j for columns of lengths d_i and d_j. So a few columns of
    the upper triangle tell σ, and the norm of such a matrix is at most 2 σ max_i d_i sqrt(sum_j d_j^2).
    """
    size = rows.shape[-1]
    chosen = torch.linspace(size / 2, size - 1, _SAMPLE, device=rows.device).long()
    columns, squares = total.new_zeros(*total.shape[:-1], _SAMPLE), total.new_zeros(total.shape[:-1])
    for part in rows.split(_PANEL, dim=-2):
        wide = part.to(torch.float64)
        columns += wide.mT @ wide[..., chosen]
        squares += torch.linalg.vector_norm(wide, dim=-2).square_()
    total.diagonal(dim1=-2, dim2=-1).copy_(squares)
    lengths = squares.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    error = (total[..., chosen] - columns) / (lengths[..., None] * lengths[..., None, chosen])
    given = torch.arange(size, device=rows.device)[:, None] < chosen
    sigma = ((error.square() * given).sum(dim=(-2, -1)) / given.sum()).sqrt()
    return 2 * sigma * lengths.amax(dim=-1) * torch.linalg.vector_norm(lengths, dim=-1)


def _exact(rows: Tensor) -> Tensor:
    """LAPACK in float64, by way of a triangle where the whole in float64 would be much larger than that."""
    if rows.shape[-2] <= 2 * rows.shape[-1] or rows.ndim > 2:
        return torch.linalg.svdvals(rows.to(torch.float64))
    triangle = rows.new_zeros(0, rows.shape[-1], dtype=torch.float64)
    for part in rows.split(max(_PANEL, rows.shape[-1]) // 2):
        triangle = torch.linalg.qr(torch.cat([triangle, part.to(torch.float64)]), mode="r").R
    return torch.linalg.svdvals(triangle)
