"""The singular value decomposition, one function for the whole library.

a = u diag(s) vh + remainder,   u (..., m, k), s (..., k) descending, vh (..., k, n)
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ._basis import column_signs, posterior_error
from ._prepare import prepare, rescale
from .errors import LinalgError
from .svd_direct import Factors, exact, gram
from .svd_lanczos import lanczos
from .svd_randomized import OVERSAMPLING, randomized
from .svd_values import singular_values

__all__ = ["SVD", "Driver", "singular_values", "svd"]

Driver = Literal["auto", "exact", "gram", "randomized", "lanczos"]

_GRAM_FROM = 64  # min(m, n) from which the Gram driver is faster than gesdd (1.2 to 1.7 times, if truncated)
_RANDOMIZED_FROM = 256  # min(m, n) from which sampling pays
_LANCZOS_TOL = {torch.float32: 1e-5, torch.float64: 1e-10}


class SVD(NamedTuple):
    """Leading singular triplets of a matrix or of a batch of matrices.

    Attributes:
        u: (..., m, k) orthonormal columns; the entry of largest magnitude in each is positive.
        s: (..., k) singular values, descending.
        vh: (..., k, n) orthonormal rows.
        error: (...,) float64, Frobenius norm of ``a - u diag(s) vh``: 0 when nothing was cut off, else the root of
            the sum of the squares left out (exact up to rounding, for every driver).
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    error: Tensor

    @property
    def rank(self) -> int:
        """Number k of triplets."""
        return self.s.shape[-1]

    def reconstruct(self) -> Tensor:
        """u diag(s) vh, (..., m, n)."""
        return (self.u * self.s[..., None, :]) @ self.vh


def svd(
    a: Tensor,
    rank: int | None = None,
    *,
    driver: Driver = "auto",
    tol: float | None = None,
    generator: torch.Generator | None = None,
) -> SVD:
    """Singular value decomposition, thin or truncated to ``rank``.

        min over rank(B) <= k of ||a - B||_F  is reached by  B = u diag(s) vh        (Eckart and Young)

    Works for every finite a: rank-deficient, zero, entries of 1e30 or 1e-30, one row, one column, non-contiguous,
    empty. Not differentiable (the input is detached).

    Args:
        a: (..., m, n), any float dtype. Half precision is computed and returned in float32: singular vectors
            rounded to 8 bits are not orthonormal.
        rank: Number k of triplets, at most min(m, n) are returned; None for all.
        driver: "exact": LAPACK gesdd, error eps * s_1, O(m n min(m, n)). "gram": eigenvectors of the smaller Gram
            matrix in float64; as accurate as "exact" for float32 input, but singular values of float64 input are
            only good to 1e-8 * s_1. "randomized": block Krylov iteration, O(m n k), Frobenius error within
            ``tol`` of the best. "lanczos": for few triplets to high accuracy. "auto": "randomized" if k + 8 <
            min(m, n) / 6 and min(m, n) >= 256; otherwise "gram" for float32 and half precision if k < min(m, n)
            >= 64; else "exact". Ask for "exact" when 1 % is not good enough.
        tol: For "randomized", the allowed excess of the Frobenius error over the best error, relative, default
            0.01. For "lanczos", the residual norm of each triplet relative to s_1, default 1e-5 in float32 and
            1e-10 in float64. The other drivers have none.
        generator: Source of the random start of "randomized" and "lanczos", on a's device. None means a private
            one with a fixed seed, so the result is the same in every call.

    Returns:
        The triplets and the error made.

    Raises:
        LinalgError: NaN or Inf in ``a``, not a float matrix, singular values too large for float32, or no algorithm
            converges (three are tried).
        ValueError: Unknown driver, rank below 1, tol not positive.

    Example:
        >>> import torch
        >>> a = torch.diag(torch.tensor([3.0, 4.0, 1.0, 2.0]))
        >>> result = svd(a, rank=2)
        >>> result.s.tolist(), round(float(result.error), 6)  # sqrt(1 + 4)
        ([4.0, 3.0], 2.236068)
        >>> torch.allclose(svd(a).reconstruct(), a)
        True

    Reference:
        C. Eckart and G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).
        The drivers name their own.
    """
    _check_options(rank, driver, tol)
    work, scale, energy = prepare(a)
    full = min(work.shape[-2:])
    kept = full if rank is None else min(rank, full)
    if work.numel() == 0:
        driver = "exact"  # LAPACK's shapes are right for empty matrices
    elif driver == "auto":
        driver = _choose(work, kept)
    if driver == "exact":
        u, s, vh = _exact(work)
        error = s[..., kept:].to(torch.float64).square().sum(dim=-1).sqrt()
    else:
        u, s, vh = _approximate(work, kept, energy, driver, tol, generator)
        error = posterior_error(work, energy, u, s, vh) if kept < full else torch.zeros_like(energy)
    u, s, vh = u[..., :kept], rescale(s[..., :kept], scale, "singular values"), vh[..., :kept, :]
    signs = column_signs(u)
    return SVD(u * signs, s, vh * signs.mT, error * scale)


def _check_options(rank: int | None, driver: str, tol: float | None) -> None:
    if driver not in get_args(Driver):
        raise ValueError(f"driver must be one of {', '.join(get_args(Driver))}, not {driver!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}; leave it out for the full decomposition")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")


def _choose(a: Tensor, rank: int) -> Driver:
    smaller = min(a.shape[-2:])
    if smaller >= _RANDOMIZED_FROM and rank + OVERSAMPLING < smaller / 6:
        return "randomized"
    truncated = rank < smaller  # for all triplets the two take the same time
    return "gram" if a.dtype == torch.float32 and smaller >= _GRAM_FROM and truncated else "exact"


def _exact(a: Tensor) -> Factors:
    try:
        return _finite(exact(a))
    except (torch.linalg.LinAlgError, LinalgError):
        return _retry(a, min(a.shape[-2:]))


def _approximate(
    a: Tensor, rank: int, energy: Tensor, driver: Driver, tol: float | None, generator: torch.Generator | None
) -> Factors:
    """Runs a driver that needs not all triplets; where it does not converge, the direct ones."""
    try:
        if driver == "gram":
            return gram(a, rank)
        if generator is None:
            generator = torch.Generator(device=a.device).manual_seed(0)
        results = []
        for matrix, own in zip(a.reshape(-1, *a.shape[-2:]), energy.reshape(-1).tolist(), strict=True):
            if driver == "randomized":
                found = randomized(matrix, rank, own, tol=tol or 0.01, generator=generator)
            else:
                found = lanczos(matrix, rank, own, tol=tol or _LANCZOS_TOL[a.dtype], generator=generator)
            results.append(found)
        u, s, vh = (torch.stack(part).reshape(*a.shape[:-2], *part[0].shape) for part in zip(*results, strict=True))
        return u, s, vh
    except (torch.linalg.LinAlgError, LinalgError):
        return _retry(a, rank)


def _retry(a: Tensor, rank: int) -> Factors:
    """Other algorithms for the rare matrix on which one fails: a float64 eigensolver, a perturbed gesdd."""

    def perturbed() -> Factors:
        u, s, vh = exact(a.to(torch.float64) * 0.7)  # other roundings, so other shifts
        return u.to(a.dtype), (s / 0.7).to(a.dtype), vh.to(a.dtype)

    attempts = [lambda: gram(a, rank), perturbed]
    if a.dtype == torch.float64:
        attempts.reverse()  # here the Gram is the less accurate of the two
    for attempt in attempts:
        try:
            u, s, vh = _finite(attempt())
            return u[..., :rank], s[..., :rank], vh[..., :rank, :]
        except (torch.linalg.LinAlgError, LinalgError):
            continue
    raise LinalgError.about("a", a, "no SVD algorithm converges", "look for entries of wildly different size")


def _finite(factors: Factors) -> Factors:
    """Some LAPACK builds return NaN instead of an error."""
    if not all(bool(part.isfinite().all()) for part in factors):
        raise LinalgError("the SVD returned NaN")
    return factors
