"""Choosing a rank: from a budget, from one spectrum, or for many matrices at once (``allocate``).

A spectrum s is a one-dimensional tensor or sequence of singular values, in any order; energy means s_i^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._counts import Form, break_even_rank, num_parameters, rank_for_parameters, rank_for_ratio
from .allocate import Matrix, Policy, allocate
from .spectrum import Spectrum, descending, shares, spectral_entropy

__all__ = [
    "Form",
    "Matrix",
    "Policy",
    "allocate",
    "break_even_rank",
    "effective_rank",
    "elbow_rank",
    "energy_at",
    "energy_rank",
    "num_parameters",
    "rank_for_parameters",
    "rank_for_ratio",
    "stable_rank",
]


def energy_rank(s: Spectrum, energy: float, *, power: float = 2.0) -> int:
    """Smallest rank that keeps the share ``energy`` of the squared Frobenius norm.

        min k with  s_1^2 + ... + s_k^2 >= energy * sum s_i^2

    Args:
        s: Singular values.
        energy: Share in [0, 1].
        power: 2; with 1 it is the share of the nuclear norm, which some papers mean by energy.

    Returns:
        The rank; 0 for a zero matrix.

    Raises:
        ValueError: energy outside [0, 1], power not positive.
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> energy_rank([3.0, 2.0, 1.0], 0.9)  # 13 of 14
        2
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"energy is a share between 0 and 1, not {energy}")
    cumulated = shares(s, power).cumsum(dim=0)
    if cumulated.numel() == 0 or energy == 0:
        return 0
    return int((cumulated < energy * cumulated[-1]).sum()) + int(cumulated[-1] > 0)


def energy_at(s: Spectrum, fraction: float) -> float:
    """Share of the energy in the largest singular values, ``fraction`` of them (rounded up).

    Args:
        s: Singular values.
        fraction: Share of the ranks, in [0, 1].

    Returns:
        A share in [0, 1]; 1 for a zero matrix, of which nothing is lost.

    Raises:
        ValueError: fraction outside [0, 1].
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> round(energy_at([2.0, 1.0, 1.0, 1.0], 0.25), 6)  # 4 of 7
        0.571429
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is a share of the ranks between 0 and 1, not {fraction}")
    squares = _scaled(s).square()
    count = int(-(-fraction * squares.numel() // 1))
    total = float(squares.sum())
    return min(1.0, float(squares[:count].sum()) / total) if total > 0 else 1.0


def elbow_rank(s: Spectrum) -> int:
    """Number of singular values before the elbow of the spectrum.

    The elbow is the point (i, s_i) farthest below the straight line from the first to the last point.

    Returns:
        The rank; all of them where no point lies below the line (a flat spectrum), 0 for a zero matrix.

    Raises:
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> elbow_rank([9.0, 8.0, 1.0, 0.5, 0.25])
        2

    Reference:
        Satopää et al., "Finding a Kneedle in a haystack", ICDCS Workshops 2011.
    """
    values = _scaled(s)
    size = values.numel()
    if size == 0 or values[0] == 0:
        return 0
    line = torch.lerp(values[0], values[-1], torch.arange(size, dtype=torch.float64) / max(1, size - 1))
    depth = line - values
    # A flat spectrum differs from its line by rounding only.
    return int(depth.argmax()) if float(depth.max()) > 1e-12 else size


def effective_rank(s: Spectrum) -> float:
    """Exponential of the entropy of the normalised singular values.

        exp(-sum p_i log p_i),  p_i = s_i / sum s_j

    Returns:
        Between 1 and the number of nonzero singular values; 0 for a zero matrix.

    Raises:
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> round(effective_rank([1.0, 1.0, 1.0, 0.0]), 6)
        3.0

    Reference:
        O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    return math.exp(spectral_entropy(s, power=1)) if bool(descending(s).any()) else 0.0


def stable_rank(s: Spectrum) -> float:
    """Squared Frobenius norm over squared spectral norm, sum s_i^2 / s_1^2.

    Returns:
        Between 1 and the number of nonzero singular values; 0 for a zero matrix.

    Raises:
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> stable_rank([2.0, 1.0, 1.0])
        1.5

    Reference:
        M. Rudelson and R. Vershynin, "Sampling from large matrices", J. ACM 54 (2007).
    """
    values = _scaled(s)
    if values.numel() == 0 or values[0] == 0:
        return 0.0
    return float(values.square().sum())


def _scaled(s: Spectrum) -> Tensor:
    """The spectrum, largest first, over its largest value, so that its squares exist."""
    values = descending(s)
    return values / values[0] if values.numel() and values[0] > 0 else values
