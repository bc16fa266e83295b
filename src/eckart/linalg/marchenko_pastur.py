"""How many singular values stand out of noise: the Marchenko-Pastur law, its edge, and the optimal hard threshold.

    y = x + σ z,   z (m, n) with independent entries of mean 0 and variance 1,   β = min(m, n) / max(m, n)

For growing m and n the s_i(σ z)^2 / (σ^2 max(m, n)) follow the Marchenko-Pastur density

    f(t) = sqrt((b - t)(t - a)) / (2 π β t)   on  a = (1 - √β)^2 <= t <= b = (1 + √β)^2

Its distribution function has a closed form in φ, where t = 1 + β + 2 √β cos φ, so the median that both estimators need
is exact; the published tables (numerical integration) differ from it in the fourth digit.

Reference: V. Marchenko and L. Pastur, Mathematics of the USSR-Sbornik 1 (1967); M. Gavish and D. Donoho, "The optimal
hard threshold for singular values is 4/√3", IEEE Trans. Inf. Theory 60 (2014), arXiv:1305.5870.
"""

from __future__ import annotations

import math

from torch import Tensor

from .errors import LinalgError
from .spectrum import Spectrum, descending

__all__ = [
    "gavish_donoho_rank",
    "gavish_donoho_threshold",
    "marchenko_pastur_edge",
    "marchenko_pastur_energy",
    "marchenko_pastur_quantile",
    "marchenko_pastur_rank",
    "noise_level",
]


def marchenko_pastur_quantile(beta: float, probability: float = 0.5) -> float:
    """Quantile of the Marchenko-Pastur distribution, by default its median μ_β.

        P(t >= 1 + β + 2 √β cos φ) = (φ - sin φ / √β + (1 - β) δ / β) / π,   δ = arg(1 + √β exp(i φ))

    Solved for φ by bisection to the last digit, which leaves an error of 1e-11 at the lower edge and less elsewhere.

    Args:
        beta: Ratio β of the shorter to the longer side, in (0, 1].
        probability: Of a value below the quantile, in [0, 1].

    Returns:
        A squared singular value, in units of the longer side and the noise variance.

    Raises:
        ValueError: beta outside (0, 1], probability outside [0, 1].

    Example:
        >>> marchenko_pastur_quantile(0.25, 1.0)  # the upper edge
        2.25
        >>> round(marchenko_pastur_quantile(1.0), 6)
        0.652776
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta is the shorter side over the longer one, between 0 and 1, not {beta}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be between 0 and 1, not {probability}")
    root = math.sqrt(beta)
    low, high = 0.0, math.pi
    while low < (phi := (low + high) / 2) < high:
        argument = math.atan2(root * math.sin(phi), 1 + root * math.cos(phi))
        above = (phi - math.sin(phi) / root + (1 - beta) * argument / beta) / math.pi
        low, high = (phi, high) if above < 1 - probability else (low, phi)
    return 1 + beta + 2 * root * math.cos(phi)


def marchenko_pastur_edge(shape: tuple[int, int], sigma: float = 1.0) -> float:
    """Upper edge of the singular values of pure noise, σ (√m + √n).

    Args:
        shape: (m, n).
        sigma: Standard deviation of the entries.

    Raises:
        ValueError: A side below 1, sigma negative or not finite.

    Example:
        >>> marchenko_pastur_edge((64, 36), sigma=0.5)
        7.0
    """
    return _checked_sigma(sigma) * (math.sqrt(_sides(shape)[0]) + math.sqrt(_sides(shape)[1]))


def marchenko_pastur_energy(beta: float, share: float) -> float:
    """Share of its energy (sum of squares) that pure noise has in its largest singular values.

        integral of t f(t) over t >= t_q = (φ - sin φ cos φ) / π,   t_q = 1 + β + 2 √β cos φ the (1 - share) quantile

    Args:
        beta: Ratio β of the shorter to the longer side, in (0, 1].
        share: Of the singular values, the largest ones, in [0, 1].

    Raises:
        ValueError: beta outside (0, 1], share outside [0, 1].

    Example:
        >>> round(marchenko_pastur_energy(1.0, 0.5), 3), marchenko_pastur_energy(1.0, 1.0)
        (0.894, 1.0)
    """
    quantile = marchenko_pastur_quantile(beta, 1 - share)
    phi = math.acos(min(1.0, max(-1.0, (quantile - 1 - beta) / (2 * math.sqrt(beta)))))
    return (phi - math.sin(phi) * math.cos(phi)) / math.pi


def noise_level(s: Spectrum, shape: tuple[int, int]) -> float:
    """Standard deviation of the noise in a matrix of low rank plus noise, from its median singular value.

        σ = median(s) / sqrt(μ_β max(m, n)),   μ_β the median of the Marchenko-Pastur law

    Robust, because a few large singular values do not move the median; each percent of min(m, n) that the signal
    takes raises the estimate by roughly a percent.

    Args:
        s: All min(m, n) singular values.
        shape: (m, n).

    Raises:
        ValueError: A side below 1.
        LinalgError: Not min(m, n) finite values >= 0.

    Example:
        >>> import torch
        >>> noise = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
        >>> s = torch.linalg.svdvals(noise + 5)  # signal of rank one
        >>> abs(noise_level(s, (300, 200)) - 1) < 0.02
        True
    """
    short, long = _sides(shape)
    values = _spectrum(s, short, complete=True)
    median = float(values[(short - 1) // 2]) / 2 + float(values[short // 2]) / 2
    return median / math.sqrt(marchenko_pastur_quantile(short / long) * long)


def marchenko_pastur_rank(s: Spectrum, shape: tuple[int, int], sigma: float | None = None) -> int:
    """Number of singular values above the edge of the noise, σ (√m + √n).

    The largest singular value of pure noise is not below the edge but around it: it fluctuates by about
    σ (√m + √n)^(1/3) (1/√m + 1/√n)^(1/3) / 2 (Tracy and Widom), and is above it in one matrix of six. And a direction
    just above the edge is estimated so badly that it is better left out: see ``gavish_donoho_rank``.

    Args:
        s: Singular values; all min(m, n) of them unless ``sigma`` is given.
        shape: (m, n).
        sigma: Standard deviation of the noise; by default that of ``noise_level``.

    Raises:
        ValueError: A side below 1, sigma negative or not finite.
        LinalgError: Not a spectrum, more values than min(m, n), or fewer and no ``sigma``.

    Example:
        >>> marchenko_pastur_rank([30.0, 21.0, 19.0, 5.0], (100, 100), sigma=1.0)  # the edge is 20
        2
    """
    edge = marchenko_pastur_edge(shape, noise_level(s, shape) if sigma is None else sigma)
    return int((_spectrum(s, _sides(shape)[0]) > edge).sum())


def gavish_donoho_threshold(beta: float, *, known_noise: bool = True) -> float:
    """Optimal hard threshold for singular values, in units of σ sqrt(max(m, n)) or of the median singular value.

        known noise     λ(β) = sqrt(2 (β + 1) + 8 β / (β + 1 + sqrt(β^2 + 14 β + 1)))        λ(1) = 4 / √3
        unknown noise   ω(β) = λ(β) / sqrt(μ_β)                                               ω(1) = 2.8584

    Args:
        beta: Ratio β of the shorter to the longer side, in (0, 1].
        known_noise: Whether the noise level is known.

    Raises:
        ValueError: beta outside (0, 1].

    Example:
        >>> round(gavish_donoho_threshold(1.0), 4), round(gavish_donoho_threshold(1.0, known_noise=False), 4)
        (2.3094, 2.8584)
    """
    median = marchenko_pastur_quantile(beta)
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))
    return known if known_noise else known / math.sqrt(median)


def gavish_donoho_rank(s: Spectrum, shape: tuple[int, int], sigma: float | None = None) -> int:
    """Number of singular values worth keeping: those above the optimal hard threshold.

        s_i > λ(β) sqrt(max(m, n)) σ,   or, σ unknown,   s_i > ω(β) median(s)

    Of all hard thresholds it leaves the least mean squared error of the denoised matrix, for m and n large and a fixed
    rank, in the worst case over signals. It is above the edge of the noise, by a factor of 1.15 for a square matrix.

    Args:
        s: Singular values; all min(m, n) of them unless ``sigma`` is given.
        shape: (m, n).
        sigma: Standard deviation of the noise, if known.

    Raises:
        ValueError: A side below 1, sigma negative or not finite.
        LinalgError: Not a spectrum, more values than min(m, n), or fewer and no ``sigma``.

    Example:
        >>> gavish_donoho_rank([30.0, 21.0, 19.0, 5.0], (100, 100), sigma=1.0)  # the threshold is 23.1
        1
    """
    short, long = _sides(shape)
    sigma = noise_level(s, shape) if sigma is None else _checked_sigma(sigma)
    return int((_spectrum(s, short) > gavish_donoho_threshold(short / long) * math.sqrt(long) * sigma).sum())


def _sides(shape: tuple[int, int]) -> tuple[int, int]:
    """Shorter and longer side."""
    short, long = sorted(shape)
    if short < 1:
        raise ValueError(f"shape must be two sides of at least 1, not {tuple(shape)}")
    return short, long


def _checked_sigma(sigma: float) -> float:
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be a finite number of at least 0, not {sigma}")
    return sigma


def _spectrum(s: Spectrum, size: int, *, complete: bool = False) -> Tensor:
    values = descending(s)
    if values.numel() > size or (complete and values.numel() < size):
        remedy = "give all of them" if complete else "give no more than that"
        raise LinalgError.about("s", values, f"does not hold the {size} singular values of this shape", remedy)
    return values
