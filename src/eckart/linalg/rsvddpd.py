"""Singular value decomposition that ignores gross outliers, by minimum density power divergence.

    min over B (m, n) of rank k, s > 0:   s^-alpha ((1 + alpha)^-1/2 - (1 + 1/alpha) mean exp(-alpha r² / (2 s²)))
    r = a - B;   solved by least squares with weights   w = exp(-alpha r² / (2 s²))   (m, n)

It is the divergence between the entries of a and a normal law around B; as alpha goes to 0 it becomes maximum
likelihood, and B the ordinary truncated decomposition. S. Roy, A. Basu and A. Ghosh, "A Robust Scalable Video
Surveillance Background Modelling Algorithm" (rSVDdpd), 2021, arXiv:2109.10680; code: subroy13/rsvddpd. As there, one
pair of singular vectors after the other is found by alternating robust regressions and subtracted, with the
interquartile range of all entries for s. Added: all pairs are then refined together while s shrinks to the noise,
because a pair inherits the errors of those before it and because that range is the size of the signal (200 x 100,
k = 3, 30 % outliers: the subspace is off by up to 4.7 degrees before and 0.8 after); of several starts the one of
lowest divergence is kept, because there are many local minima; entries may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._basis import column_signs
from ._dpd import Fit, divergence, noise, product, spread
from ._prepare import prepare, rescale, result_dtype, squared_norm
from .contract import MatrixMethod
from .errors import LinalgError
from .svd import svd

__all__ = ["RSVDDPD", "RobustSVD", "robust_alpha", "robust_rank", "robust_svd"]

_GRID = tuple(i / 10 for i in range(11))


class RobustSVD(NamedTuple):
    """Leading singular triplets of a matrix without its outliers.

    Attributes:
        u: (..., m, k) orthonormal columns; the entry of largest magnitude in each is positive.
        s: (..., k) singular values, descending.
        vh: (..., k, n) orthonormal rows.
        error: (...,) float64, Frobenius norm of ``a - u diag(s) vh`` over all observed entries, outliers included.
        noise: (...,) float64, robust standard deviation of these residuals (root mean square for alpha = 0). Entries
            several times further off are outliers: the foreground of a video.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    error: Tensor
    noise: Tensor

    def reconstruct(self) -> Tensor:
        """u diag(s) vh, (..., m, n)."""
        return product((self.u, self.s, self.vh))


def robust_svd(
    a: Tensor,
    rank: int,
    alpha: float = 0.3,
    *,
    observed: Tensor | None = None,
    refine: bool = True,
    restarts: int = 1,
    tol: float = 1e-6,
    max_passes: int = 100,
    generator: torch.Generator | None = None,
) -> RobustSVD:
    """Singular value decomposition of what remains of ``a`` when gross outliers get no weight.

        a (..., m, n) = u (..., m, k) diag(s) vh (..., k, n) + noise + outliers

    Withstands up to 40 % outliers at random places, and whole rows or columns of them if they are fewer (a fifth); the
    price on clean data is a tenth of the accuracy. Each of 2 + restarts starts takes some 30 passes of O(m n k) a
    pair and of O(m n k²) for all, with a few copies of ``a``. Where no entry is suspect use `svd`, which is hundreds of
    times faster. Not differentiable.

    Args:
        a: (..., m, n), any float dtype. Entries that are not observed may be NaN.
        rank: Number k of triplets, at most min(m, n); see `robust_rank`.
        alpha: Robustness in [0, 1], 0.3 in the paper. A smaller one is more accurate on clean data and fails silently
            with many outliers; 0 is the ordinary decomposition. See `robust_alpha`.
        observed: (..., m, n) bool, False where an entry is missing. Every row and column needs more than k True.
        refine: Whether to refine the pairs together; False is the paper's estimate.
        restarts: Random starts, besides two from medians; in our measurements none of them won.
        tol: Relative change of the reconstruction (of one pair, before refining) at which to stop; at least 30 eps.
        max_passes: When to stop in any case, for each pair and for refining; 100 in the paper.
        generator: Source of the random starts, on a's device. None means a private one with a fixed seed.

    Returns:
        The triplets, the error and the noise, in float64 for float64 input and float32 otherwise.

    Raises:
        LinalgError: Not a float matrix, empty, NaN or Inf in an observed entry, or a mask that does not fit.
        ValueError: rank or max_passes below 1, restarts below 0, alpha outside [0, 1], tol not positive.

    Example:
        >>> import torch
        >>> a = torch.arange(1.0, 21.0).reshape(5, 4)
        >>> clean = torch.linalg.svdvals(a)[:2]
        >>> a[2, 1] = 100
        >>> torch.allclose(robust_svd(a, rank=2).s, clean, rtol=1e-3)
        True

    Reference:
        Roy, Basu and Ghosh, arXiv:2109.10680.
    """
    _check_options(rank, alpha, restarts, tol, max_passes)
    if observed is not None:
        if observed.dtype != torch.bool or observed.shape != a.shape:
            raise LinalgError.about("observed", observed, f"is no mask of a {tuple(a.shape)}", "give one bool an entry")
        a = a.detach().where(observed, 0)
    work, magnitude, _ = prepare(a, dtype=torch.float64)
    if work.numel() == 0:
        raise LinalgError.about("a", a, "is empty", "give it at least one row and one column")
    if alpha == 0 and observed is None:
        found = svd(a, rank, driver="exact")
        return RobustSVD(*found, found.error / math.sqrt(a.shape[-2] * a.shape[-1]))
    if observed is not None:
        work = work.where(observed, torch.nan)
    unit, dtype = spread(work), result_dtype(a)
    # Beyond a trillion spreads an entry has no weight, and its size would only overflow.
    x = (work / unit[..., None, None]).clamp(-1e12, 1e12).to(dtype)
    fit = Fit(x, min(rank, *x.shape[-2:]), alpha, max(tol, 30 * torch.finfo(dtype).eps), max_passes)
    u, s, vh = fit.best(refine, restarts, generator or torch.Generator(device=a.device).manual_seed(0))
    residual = work - product((u.double(), s * unit[..., None], vh.double()))
    error, left = squared_norm(residual.nan_to_num()).sqrt(), noise(residual, alpha)
    signs, s = column_signs(u), rescale(s, unit * magnitude, "singular values")
    return RobustSVD(u * signs, s, vh * signs.mT, error * magnitude, left * magnitude)


def robust_rank(a: Tensor, alpha: float = 0.3, *, max_rank: int = 10, restarts: int = 0) -> int:
    """Number of singular triplets that stand out from noise and outliers.

        min over k of   divergence(k) + k s(k)^-alpha (1/m + 1/n) log(min(m, n)) / (2 sqrt(1 + alpha))

    divergence(k) is that of `robust_svd` at rank k, and s(k) its s. For alpha = 0 this is IC_p2 of J. Bai and S. Ng,
    "Determining the number of factors in approximate factor models", Econometrica 70 (2002), which is consistent. The
    penalties of the paper are smaller: with them, and these fits, the largest rank on offer won more often than the
    true one.

    Args:
        a: (m, n), one matrix, any float dtype.
        alpha: As in `robust_svd`.
        max_rank: Largest rank tried, as long as there are four entries for each of its k (m + n - k) parameters: a
            robust fit with half as many parameters as entries can follow half of the entries exactly.
        restarts: As in `robust_svd`.

    Returns:
        The rank; 0 if nothing stands out.

    Raises:
        LinalgError: As `robust_svd`, or ``a`` is a batch.
        ValueError: As `robust_svd`, or max_rank below 1.

    Example:
        >>> import torch
        >>> a = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
        >>> a += torch.outer(torch.arange(20.0), torch.ones(30))
        >>> a[3, 5], a[7, 1] = 1000, -1000
        >>> robust_rank(a)
        1
    """
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, not {max_rank}")
    _check_options(1, alpha, restarts)
    work = _one_matrix(a)
    m, n = work.shape
    penalty = (1 / m + 1 / n) * math.log(min(m, n)) / (2 * math.sqrt(1 + alpha))
    values = []
    for rank in range(min(max_rank, m, n) + 1):
        if rank > 1 and 4 * rank * (m + n - rank) > m * n:
            break
        fitted = robust_svd(work, rank, alpha, restarts=restarts).reconstruct() if rank else 0
        value, s = divergence(work - fitted, alpha)
        values.append(float(value + rank * penalty * s**-alpha))
    return values.index(min(values))


def robust_alpha(a: Tensor, rank: int, *, grid: Sequence[float] = _GRID, restarts: int = 0) -> float:
    """The alpha of least estimated mean squared error.

        min over alpha of   max(0, ||B(alpha) - B(1)||² - 3 (v(1) - v(alpha))) + v(alpha)
        v(alpha) = k (m + n - k) s² (1 + alpha² / (1 + 2 alpha))^3/2

    B(alpha) is the reconstruction of `robust_svd` and v its variance under normal noise s; alpha = 1 is the reference.
    The paper takes the whole distance from the reference for bias, and so mostly chooses 1, on clean data too. Here
    three times the variance of the difference is taken off first; three, because v is that of large matrices. With
    fewer than a dozen entries for each of the k (m + n - k) parameters it still errs towards 1.

    Args:
        a: (m, n), one matrix, any float dtype.
        rank: Number k of triplets.
        grid: Values to choose from, in [0, 1]; default 0, 0.1, ..., 1.
        restarts: As in `robust_svd`.

    Returns:
        A value of the grid.

    Raises:
        LinalgError: As `robust_svd`, or ``a`` is a batch.
        ValueError: As `robust_svd`, or the grid is empty.

    Example:
        >>> import torch
        >>> a = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
        >>> a += torch.outer(torch.arange(20.0), torch.ones(30))
        >>> a[3, 5], a[7, 1] = 1000, -1000
        >>> robust_alpha(a, rank=1, grid=[0.0, 0.2, 1.0])
        0.2
    """
    if not grid:
        raise ValueError("grid must hold at least one alpha")
    for alpha in grid:
        _check_options(rank, alpha, restarts)
    work = _one_matrix(a)
    fits = [robust_svd(work, rank, alpha, restarts=restarts) for alpha in (*grid, 1.0)]
    reference, s = fits[-1].reconstruct(), float(torch.stack([fit.noise for fit in fits]).median())
    k = fits[-1].s.shape[-1]

    def variance(alpha: float) -> float:
        return k * (sum(work.shape) - k) * s**2 * (1 + alpha**2 / (1 + 2 * alpha)) ** 1.5

    scores = []
    for alpha, fit in zip(grid, fits[:-1], strict=True):
        distance = float(squared_norm(fit.reconstruct() - reference))
        scores.append(max(0.0, distance - 3 * (variance(1) - variance(alpha))) + variance(alpha))
    return grid[scores.index(min(scores))]


def _one_matrix(a: Tensor) -> Tensor:
    """``a`` in float64 and units of its spread."""
    if a.ndim != 2 or a.numel() == 0:
        raise LinalgError.about("a", a, "is not one matrix with entries", "call this for each matrix of a batch")
    work = prepare(a, dtype=torch.float64).matrix
    return (work / spread(work)).clamp(-1e12, 1e12)


def _check_options(rank: int, alpha: float, restarts: int, tol: float = 1e-6, max_passes: int = 100) -> None:
    for name, value, least in (("rank", rank, 1), ("restarts", restarts, 0), ("max_passes", max_passes, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}; the paper uses 0.3")
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")


@dataclass(frozen=True)
class RSVDDPD(MatrixMethod):
    """`robust_svd` with its options.

    Attributes:
        alpha: Robustness in [0, 1]; 0.3 in the paper, 0 is the ordinary decomposition.
        refine: Whether to refine the pairs of singular vectors together; False is the paper's estimate.
        restarts: Random starts, besides two from medians; 1.
        tol: Relative change at which to stop; 1e-6, in the paper's code 1e-4.
        max_passes: When to stop in any case; 100.

    Example:
        >>> import torch
        >>> a = torch.ones(4, 3)
        >>> a[0, 0] = 50
        >>> torch.allclose(RSVDDPD()(a, rank=1).reconstruct(), torch.ones(4, 3))
        True
    """

    alpha: float = 0.3
    refine: bool = True
    restarts: int = 1
    tol: float = 1e-6
    max_passes: int = 100

    def __post_init__(self) -> None:
        _check_options(1, self.alpha, self.restarts, self.tol, self.max_passes)

    def __call__(
        self, a: Tensor, rank: int, *, observed: Tensor | None = None, generator: torch.Generator | None = None
    ) -> RobustSVD:
        """Robust decomposition of a (..., m, n)."""
        return robust_svd(
            a,
            rank,
            self.alpha,
            observed=observed,
            refine=self.refine,
            restarts=self.restarts,
            tol=self.tol,
            max_passes=self.max_passes,
            generator=generator,
        )
