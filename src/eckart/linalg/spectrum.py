"""Figures of one spectrum: how its weight is spread over the singular values.

    p_i = s_i^q / sum_j s_j^q       q = 1: shares of the nuclear norm,  q = 2: of the energy

A spectrum s is a one-dimensional tensor or sequence of singular values, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import LinalgError

__all__ = ["Spectrum", "descending", "explained_variance_ratio", "shares", "spectral_entropy"]

Spectrum = Tensor | Sequence[float]


def descending(s: Spectrum, name: str = "s") -> Tensor:
    """The spectrum in float64 on the CPU, largest first.

    Raises:
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.
    """
    given = s if isinstance(s, Tensor) else torch.tensor(s, dtype=torch.float64)  # not torch's default, float32
    values = given.detach().to(device="cpu", dtype=torch.float64)
    if values.ndim != 1 or not bool(((values >= 0) & values.isfinite()).all()):
        raise LinalgError.about(
            name, values, "is not a one-dimensional spectrum of finite values >= 0", "give singular values"
        )
    return values.sort(descending=True).values


def shares(s: Spectrum, power: float = 2.0) -> Tensor:
    """s_i^power / sum s_j^power, descending; zeros for a zero matrix. No scale overflows.

    Raises:
        ValueError: power not a positive number.
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.
    """
    if not 0 < power < math.inf:
        raise ValueError(f"power must be a positive number, not {power}; 1 for singular values, 2 for their energy")
    values = descending(s)
    if values.numel() == 0 or values[0] == 0:
        return values
    powers = (values / values[0]) ** power
    return powers / powers.sum()


def spectral_entropy(s: Spectrum, *, power: float = 2.0, normalized: bool = False) -> float:
    """Shannon entropy, in nats, of the spectrum taken as a distribution.

        H = -sum p_i log p_i,   p_i = s_i^power / sum_j s_j^power

    With power 2 the p_i are the eigenvalues of the Gram matrix over its trace, and H is its von Neumann entropy, the
    "matrix entropy" of representations. With power 1, exp(H) is ``effective_rank``.

    Args:
        s: Singular values.
        power: 2 (energy) by default; 1 for the singular values themselves.
        normalized: Divide by the largest value possible, the logarithm of the number of singular values given. (For
            N vectors of d entries the literature divides by log d: give d values, zeros included.)

    Returns:
        Between 0 (one direction, or a zero matrix) and log n, or 1 if ``normalized``.

    Raises:
        ValueError: power not a positive number.
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> round(spectral_entropy([1.0, 1.0, 0.0, 0.0], normalized=True), 6)  # log 2 / log 4
        0.5

    Reference:
        L. Wei, Z. Tan, C. Li, J. Wang and W. Huang, "Diff-eRank: a novel rank-based metric for evaluating large
        language models", NeurIPS 2024, arXiv:2401.17139; O. Roy and M. Vetterli, EUSIPCO 2007, for power 1.
    """
    p = shares(s, power)
    entropy = float(torch.special.entr(p).sum()) + 0.0  # no negative zero
    return entropy / math.log(p.numel()) if normalized and p.numel() > 1 else entropy


def explained_variance_ratio(s: Spectrum, *, total: float | None = None) -> Tensor:
    """Share of the variance along each principal direction.

        s_i^2 / total,   total = sum_j s_j^2

    Args:
        s: Singular values of the data matrix; centre its columns first if variance is to mean variance.
        total: Squared Frobenius norm of the data, if ``s`` holds only the leading singular values.

    Returns:
        (n,) float64 on the CPU, descending; zeros for a zero matrix.

    Raises:
        ValueError: total not finite, or smaller than the energy of ``s``.
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> explained_variance_ratio([2.0, 1.0], total=10.0).tolist()
        [0.4, 0.1]
    """
    if total is None:
        return shares(s)
    values = descending(s)
    if not 0 <= total < math.inf or torch.linalg.vector_norm(values) > (1 + 1e-6) * total**0.5:
        raise ValueError(f"total must be a finite number, at least the energy of the values given, not {total}")
    return (values / total**0.5).square() if total > 0 else values
