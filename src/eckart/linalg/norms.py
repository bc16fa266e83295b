"""Matrix norms, in float64 whatever the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ._prepare import prepare, squared_norm
from .errors import LinalgError
from .svd import singular_values, svd

__all__ = [
    "frobenius_norm",
    "nuclear_norm",
    "nuclear_norm_l12",
    "relative_error",
    "schatten_norm",
    "spectral_norm",
]

_ITERATE_FROM = 256  # min(m, n) from which a few Lanczos steps are cheaper than all singular values


def frobenius_norm(a: Tensor) -> Tensor:
    """Root of the sum of squares, ||a||_F = sqrt(sum a_ij^2).

    Args:
        a: (..., m, n), any float dtype.

    Returns:
        (...,) float64.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.

    Example:
        >>> import torch
        >>> float(frobenius_norm(torch.tensor([[3e200, 0.0]], dtype=torch.float64)))  # no overflow
        3e+200
    """
    work, scale, _ = prepare(a)
    rows = torch.linalg.vector_norm(work, dim=-1, dtype=torch.float64)  # in two steps: shorter sums, less rounding
    return torch.linalg.vector_norm(rows, dim=-1) * scale


def spectral_norm(a: Tensor) -> Tensor:
    """Largest singular value, ||a||_2 = s_1, to 1e-9 relative (the square of the Lanczos residual).

    Args:
        a: (..., m, n), any float dtype.

    Returns:
        (...,) float64; 0 for an empty matrix.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.

    Example:
        >>> import torch
        >>> float(spectral_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]])))
        4.0
    """
    work, scale, _ = prepare(a)
    if min(work.shape[-2:]) >= _ITERATE_FROM:
        return svd(work.to(torch.float64), rank=1, driver="lanczos", tol=1e-5).s[..., 0] * scale
    s = singular_values(work)
    return (s[..., 0] if s.shape[-1] else s.sum(dim=-1)) * scale


def nuclear_norm(a: Tensor) -> Tensor:
    """Sum of the singular values, ||a||_* = sum s_i; (..., m, n) -> (...,) float64.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.

    Example:
        >>> import torch
        >>> float(nuclear_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]])))
        7.0
    """
    return singular_values(a).sum(dim=-1)


def nuclear_norm_l12(a: Tensor, *, truncated: bool = False) -> Tensor:
    """Upper bound of the nuclear norm without singular values: the sum of the column norms.

        ||a||_* <= ||a||_{1,2} = sum_j ||a_:j||_2 <= sqrt(n) ||a||_F

    Equal to the nuclear norm iff the columns are orthogonal, close to it for m much larger than n and columns of
    little correlation. O(m n). The bound depends on the basis: rotating the rows of a leaves the nuclear norm as it
    is and may raise this one by sqrt(n). The exact ``nuclear_norm`` is O(m n min(m, n)) through the smaller Gram
    matrix, so for a few hundred rows or columns there is nothing to save.

    Args:
        a: (..., m, n), any float dtype.
        truncated: Sum only the min(m, n) largest column norms, as the Matrix Nuclear-Norm of language models is
            published (rows are the tokens, centred and of unit length). For m >= n there is no difference; for m < n
            it is no bound in either direction and measures the few largest columns: for a Gaussian 20 x 768 matrix a
            quarter of the nuclear norm.

    Returns:
        (...,) float64.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.

    Example:
        >>> import torch
        >>> a = torch.tensor([[3.0, 4.0]])
        >>> [float(norm) for norm in (nuclear_norm(a), nuclear_norm_l12(a), nuclear_norm_l12(a, truncated=True))]
        [5.0, 7.0, 4.0]

    Reference:
        Y. Li et al., "Large Language Model Evaluation via Matrix Nuclear-Norm", Findings of EMNLP 2025,
        arXiv:2410.10672.
    """
    work, scale, _ = prepare(a)
    lengths = torch.linalg.vector_norm(work, dim=-2, dtype=torch.float64)
    if truncated and work.shape[-2] < work.shape[-1]:
        lengths = lengths.topk(work.shape[-2], dim=-1).values
    return lengths.sum(dim=-1) * scale


def schatten_norm(a: Tensor, p: float) -> Tensor:
    """The p-norm of the singular values, (sum s_i^p)^(1/p).

    p = 1 is the nuclear norm, 2 the Frobenius norm, inf the spectral norm; below 1 a quasi-norm.

    Args:
        a: (..., m, n), any float dtype.
        p: Order, above 0.

    Returns:
        (...,) float64.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.
        ValueError: p not above 0.

    Example:
        >>> import torch
        >>> float(schatten_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]]), 2))
        5.0
    """
    if not p > 0:
        raise ValueError(f"p must be above 0, not {p}")
    s = singular_values(a)
    if not s.shape[-1]:
        return s.sum(dim=-1)
    largest = s[..., :1].clamp(min=torch.finfo(s.dtype).tiny)  # the powers of 1e300 overflow even in float64
    return torch.linalg.vector_norm(s / largest, ord=p, dim=-1) * largest[..., 0]


def relative_error(approximation: Tensor, reference: Tensor) -> Tensor:
    """Distance of two matrices relative to the second, ||approximation - reference||_F / ||reference||_F.

    Args:
        approximation: (..., m, n), any float dtype.
        reference: (..., m, n).

    Returns:
        (...,) float64. For a zero reference 0 if the approximation is zero too, else infinity.

    Raises:
        LinalgError: Different shapes, NaN or Inf.

    Example:
        >>> import torch
        >>> float(relative_error(torch.tensor([[1.0, 2.5]]), torch.tensor([[1.5, 2.0]])))
        0.282842712474619
    """
    if approximation.shape != reference.shape:
        raise LinalgError.about(
            "approximation", approximation, f"differs in shape from {tuple(reference.shape)}", "compare equal shapes"
        )
    first, first_scale, _ = prepare(approximation, "approximation", dtype=torch.float64)
    second, second_scale, energy = prepare(reference, "reference", dtype=torch.float64)
    # The difference of the originals could overflow; that of both over the larger scale cannot.
    scale = torch.maximum(first_scale, second_scale)
    first = first * (first_scale / scale)[..., None, None]
    distance = squared_norm(first - second * (second_scale / scale)[..., None, None]).sqrt()
    size = energy.sqrt() * (second_scale / scale)
    return torch.where(distance == 0, 0, distance / size)
