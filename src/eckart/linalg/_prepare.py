"""What every matrix function does first: check, promote, scale.

A matrix with entries near 1e30 overflows float32 as soon as two entries are multiplied, one near 1e-30
underflows. ``prepare`` divides each matrix of a batch by a power of two (exact in binary floating point), so
that the algorithms only ever see well-scaled numbers; they multiply the scale back into their results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import LinalgError

__all__ = ["Prepared", "all_finite", "prepare", "rescale", "result_dtype", "squared_norm"]

# A matrix with a squared Frobenius norm in this range needs no scaling: products of a few such matrices neither
# overflow nor underflow in float32. So the usual matrix is used as it is, without a copy.
_SMALLEST, _LARGEST = 2.0**-40, 2.0**60
_PIECE = 1024  # entries of a row summed in the input's dtype: few additions per lane, rounded by less than 1e-6


class Prepared(NamedTuple):
    """A checked and well-scaled matrix or batch of matrices.

    Attributes:
        matrix: (..., m, n); the original is ``matrix * scale``.
        scale: (...,) float64, powers of two.
        energy: (...,) float64, squared Frobenius norm of ``matrix``.
    """

    matrix: Tensor
    scale: Tensor
    energy: Tensor


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, float32 otherwise (half precision is computed in float32)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def prepare(a: Tensor, name: str = "a", *, dtype: torch.dtype | None = None, square: bool = False) -> Prepared:
    """Checks ``a`` (..., m, n), promotes it to ``dtype`` and scales each matrix to entries near one.

    The result is detached: nothing in this package records gradients.

    Args:
        a: Real floating-point matrix or batch of matrices.
        name: What the argument is called in the error message.
        dtype: float32 or float64; by default the input's own, with half precision promoted to float32.
        square: Whether m = n is required.

    Raises:
        LinalgError: Not a real floating-point matrix, or NaN or Inf in it.
    """
    if not a.is_floating_point():
        raise LinalgError.about(name, a, "is not real floating point", "convert it with .float() first")
    if a.ndim < 2:
        raise LinalgError.about(name, a, "is not a matrix", "give it two dimensions, rows and columns")
    if square and a.shape[-2] != a.shape[-1]:
        raise LinalgError.about(name, a, "is not square", "give a symmetric matrix such as x.T @ x")
    original, a = a, a.detach().to(dtype or result_dtype(a))
    # One pass over the usual matrix tells its norm, and that it is finite and well scaled.
    energy = squared_norm(a)
    scale = torch.ones_like(energy)
    extreme = ~((energy >= _SMALLEST) & (energy <= _LARGEST))  # true for NaN as well
    if a.numel() == 0 or not bool(extreme.any()):
        return Prepared(a, scale, energy)
    largest = torch.maximum(a.amax(dim=(-2, -1)), -a.amin(dim=(-2, -1))).to(torch.float64)
    if not bool(largest.isfinite().all()):
        raise LinalgError.about(name, original, "contains NaN or Inf", "find where it comes from, or mask it")
    mantissa, _ = torch.frexp(largest.clamp(min=2.0**-1000))  # keeps 1 / scale finite in float64
    scale = torch.where(extreme & (largest > 0), largest.clamp(min=2.0**-1000) / mantissa, scale)
    # The division is done in float64 because 1 / scale may not be representable in float32.
    a = (a.to(torch.float64) / scale[..., None, None]).to(a.dtype)
    return Prepared(a, scale, squared_norm(a))


def rescale(values: Tensor, scale: Tensor, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """``values * scale`` in ``dtype`` (that of ``values``), with ``scale`` (...,) broadcast over trailing dimensions.

    Raises:
        LinalgError: The product is too large for that dtype.
    """
    scale = scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim))
    result = (values.to(torch.float64) * scale).to(dtype or values.dtype)
    if not bool(result.isfinite().all()):
        remedy = "scale the input down" if result.dtype == torch.float64 else "pass the input as float64"
        raise LinalgError.about(what, result, "overflows this dtype", remedy)
    return result


def all_finite(a: Tensor) -> bool:
    """Whether no entry is NaN or Inf, without the copies that ``torch.isfinite`` makes: extremes propagate NaN."""
    return a.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(a.detach()))


def squared_norm(a: Tensor) -> Tensor:
    """Sum of squares of each matrix, (..., m, n) -> (...,) float64, to 1e-6 for float32 input, as a rule to 1e-8.

    Pieces of a row are summed in the input's dtype, at the speed of memory, and the pieces in float64.
    """
    if a.stride(-2) < a.stride(-1):
        a = a.mT  # walk along memory
    total = a.new_zeros(a.shape[:-2], dtype=torch.float64)
    whole = a.shape[-1] // _PIECE * _PIECE
    for pieces in (a[..., :whole].unflatten(-1, (-1, _PIECE)), a[..., None, whole:]):
        total = total + torch.linalg.vector_norm(pieces, dim=-1).to(torch.float64).square().sum(dim=(-2, -1))
    return total
