"""Proximal operators and projections that make a matrix sparse or of low rank.

    soft_threshold             argmin over b of  1/2 ||a - b||_F^2 + tau ||b||_1
    singular_value_threshold   argmin over b of  1/2 ||a - b||_F^2 + tau ||b||_*       (sum of singular values)
    hard_threshold             argmin over b of  ||a - b||_F^2   with at most ``count`` nonzeros

Reference: N. Parikh and S. Boyd, "Proximal algorithms", Foundations and Trends in Optimization 1 (2014); J.-F. Cai,
E. Candès and Z. Shen, "A singular value thresholding algorithm for matrix completion", SIAM J. Optimization 20 (2010),
arXiv:0810.3286. What differs here: the singular value threshold computes only the triplets above it, starting from a
guess of how many there are, and gives factors instead of a dense matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._prepare import all_finite, prepare, rescale, result_dtype
from .errors import LinalgError
from .svd import SVD, Driver, svd

__all__ = ["accurate_driver", "hard_threshold", "singular_value_threshold", "soft_threshold"]


def soft_threshold(a: Tensor, tau: float | Tensor) -> Tensor:
    """Shrinks every entry towards zero by ``tau``, the proximal operator of the sum of absolute values.

        b_ij = sign(a_ij) max(|a_ij| - tau, 0)

    One pass over a. Not differentiable (the input is detached).

    Args:
        a: Any shape, any float dtype.
        tau: Threshold of at least 0, a number or a tensor that broadcasts against a.

    Returns:
        b, in float64 for float64 input and float32 otherwise.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float tensor.
        ValueError: tau negative or not finite.

    Example:
        >>> import torch
        >>> soft_threshold(torch.tensor([3.0, -0.5, -2.0]), 1.0).tolist()
        [2.0, 0.0, -1.0]
    """
    threshold = _threshold(tau, a)
    work = _checked(a)
    return work - work.clamp(-threshold, threshold)


def hard_threshold(a: Tensor, count: int, *, dim: int | None = None) -> Tensor:
    """Keeps the ``count`` entries of largest magnitude and sets the others to zero: the nearest sparse matrix.

        min over b with at most count nonzeros of ||a - b||_F

    O(m n) by selection, not sorting. Of entries of equal size at the boundary any may stay, but never more than
    ``count`` in all.

    Args:
        a: (..., m, n), any float dtype.
        count: Entries kept in each matrix, or in each slice along ``dim``; at most all of them are.
        dim: Dimension along which ``count`` holds, -1 for each row; None for the whole matrix.

    Returns:
        b (..., m, n), in float64 for float64 input and float32 otherwise.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.
        ValueError: count negative.

    Example:
        >>> import torch
        >>> a = torch.tensor([[3.0, -4.0], [2.0, -1.0]])
        >>> hard_threshold(a, 2).tolist(), hard_threshold(a, 1, dim=-1).tolist()
        ([[3.0, -4.0], [0.0, 0.0]], [[0.0, -4.0], [2.0, 0.0]])
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, not {count}")
    work = _checked(a)
    if a.ndim < 2:
        raise LinalgError.about("a", a, "is not a matrix", "give it two dimensions, rows and columns")
    flat, dim = (work.flatten(-2), -1) if dim is None else (work, dim)
    if count >= flat.shape[dim]:
        return work.clone()
    kept = flat.abs().topk(count, dim=dim, sorted=False).indices
    return torch.zeros_like(flat).scatter_(dim, kept, flat.gather(dim, kept)).reshape(work.shape)


def singular_value_threshold(a: Tensor, tau: float | Tensor, *, guess: int | None = None) -> SVD:
    """Shrinks every singular value towards zero by ``tau``, the proximal operator of the nuclear norm.

        b = u diag(max(s - tau, 0)) vh,   a = u diag(s) vh

    The cost is that of the SVD, O(m n min(m, n)); with a ``guess`` near the number of singular values above tau, the
    O(m n guess) of a few Lanczos triplets. A guess too small only costs time: it is doubled until a singular value
    below tau is seen. Not differentiable.

    Args:
        a: (..., m, n), any float dtype.
        tau: Threshold of at least 0, in units of a: a number, or a tensor (...,) with one for each matrix.
        guess: Expected number of singular values above tau; None computes all of them.

    Returns:
        The triplets above tau, as many as the matrix of the batch with most of them has (the others are filled up
        with zero singular values); ``error`` is ||a - b||_F.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.
        ValueError: tau negative or not finite, guess negative.

    Example:
        >>> import torch
        >>> result = singular_value_threshold(torch.diag(torch.tensor([3.0, 4.0, 1.0])), 2.0)
        >>> result.s.tolist(), float(result.error)  # sqrt(2^2 + 2^2 + 1^2)
        ([2.0, 1.0], 3.0)
    """
    if guess is not None and guess < 0:
        raise ValueError(f"guess must be at least 0, not {guess}; leave it out to compute all singular values")
    threshold = _threshold(tau, a).to(torch.float64)
    work, scale, _ = prepare(a)
    threshold = (threshold / scale)[..., None]
    full = min(work.shape[-2:])
    wanted = full if guess is None else min(full, guess + 1)
    found = svd(work, max(1, wanted), driver=accurate_driver(work, wanted))
    while wanted < full and bool((found.s[..., -1:] > threshold).any()):
        wanted = min(full, 2 * wanted)
        found = svd(work, wanted, driver=accurate_driver(work, wanted))
    s = found.s.to(torch.float64)
    removed = torch.linalg.vector_norm(torch.minimum(s, threshold), dim=-1)
    left = (s - threshold).clamp(min=0)
    kept = int((left > 0).sum(dim=-1).max()) if left.numel() else 0
    left = rescale(left[..., :kept].to(work.dtype), scale, "singular values")
    return SVD(found.u[..., :kept], left, found.vh[..., :kept, :], torch.hypot(found.error, removed) * scale)


def accurate_driver(a: Tensor, rank: int) -> Driver:
    """The fastest driver of the SVD of which every triplet is accurate: the randomized one only promises their sum."""
    smaller = min(a.shape[-2:])
    if smaller >= 256 and rank <= smaller / 20:
        return "lanczos"
    return "gram" if a.dtype == torch.float32 and rank < smaller else "exact"


def _threshold(tau: float | Tensor, a: Tensor) -> Tensor:
    threshold = torch.as_tensor(tau, dtype=result_dtype(a) if isinstance(tau, Tensor) else torch.float64)
    threshold = threshold.detach().to(a.device)
    if not bool(((threshold >= 0) & threshold.isfinite()).all()):
        raise ValueError(f"tau must be finite and at least 0, not {tau}")
    return threshold


def _checked(a: Tensor) -> Tensor:
    """A tensor of any shape, checked like a matrix in ``prepare`` but not scaled."""
    if not a.is_floating_point():
        raise LinalgError.about("a", a, "is not real floating point", "convert it with .float() first")
    if not all_finite(a):
        raise LinalgError.about("a", a, "contains NaN or Inf", "find where it comes from, or mask it")
    return a.detach().to(result_dtype(a))
