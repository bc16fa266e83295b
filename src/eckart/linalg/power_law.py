"""Power laws in the tail of a sample, such as the eigenvalues of a weight's Gram matrix.

p(x) = (α - 1) / x_min (x / x_min)^-α,   x >= x_min
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .spectrum import Spectrum, descending

__all__ = ["PowerLaw", "power_law_tail"]

_ENTRIES = 1 << 15  # of the table of distances that is in memory at once
_FEW = 16  # points by which starts are ruled out
_EQUAL = 1e-9  # relative difference below which two values count as one


class PowerLaw(NamedTuple):
    """A power law fitted to the largest values of a sample.

    Attributes:
        exponent: α > 1, of the density.
        start: x_min, the value where the tail begins.
        distance: Kolmogorov-Smirnov distance between the tail and the law, in [0, 1].
        points: Number of values in the tail, x_min among them.
    """

    exponent: float
    start: float
    distance: float
    points: int


def power_law_tail(values: Spectrum) -> PowerLaw | None:
    """The power law that fits a tail of the values best, and where that tail begins.

        α(x_min) = 1 + n / sum log(x_i / x_min)            maximum likelihood, over the n values x_i >= x_min
        D(x_min) = max_i |F(x_i) - (i - 1) / n|,   F(x) = 1 - (x / x_min)^(1 - α),   x_1 <= ... <= x_n
        x_min    = argmin D

    Every value but the largest is tried as x_min. The empirical distribution counts what lies below each x_i, as in
    the authors' code and in WeightWatcher (the two-sided distance is at most 1 / n larger). A small distance does not
    mean that the values follow a power law: the tail is as short as fits best, and tails of noise have exponents too.
    O(N^2) time, memory bounded.

    Args:
        values: N values, in any order; zeros are left out.

    Returns:
        The fit; None for fewer than two different values above zero.

    Raises:
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> import torch
        >>> quantiles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        >>> found = power_law_tail((1 - quantiles) ** -0.5)  # exponent 1 + 1 / 0.5
        >>> round(found.exponent, 1), found.points > 900
        (3.0, True)

    Reference:
        A. Clauset, C. Shalizi and M. Newman, "Power-law distributions in empirical data", SIAM Review 51 (2009),
        arXiv:0706.1062; C. Martin, T. Peng and M. Mahoney, "Predicting trends in the quality of state-of-the-art
        neural networks without access to training or testing data", Nature Communications 12 (2021),
        arXiv:2002.06716, for eigenvalues of weights.
    """
    x = descending(values, "values").flip(0)
    x = x[x > 0]
    logs = (x / x[-1:]).log()
    # Equal values give the same tail, which begins at the first of them; the largest has no tail beyond it.
    starts = torch.nonzero(torch.diff(logs, prepend=logs.new_full((1,), -torch.inf)) > _EQUAL).flatten()[:-1]
    if starts.numel() == 0:
        return None
    counts = len(x) - starts
    slopes = counts / (logs.flip(0).cumsum(0).flip(0)[starts] - counts * logs[starts])  # α - 1
    # A few points of each tail bound its distance from below, which rules most starts out.
    few = starts[:, None] + (torch.linspace(0, 1, _FEW, dtype=logs.dtype) * (counts[:, None] - 1)).long()
    bound = _gaps(logs[few], logs[starts], few - starts[:, None], counts, slopes)
    distances = torch.full_like(bound, torch.inf)
    first = bound.argmin().reshape(1)
    distances[first] = _distances(logs, starts[first], counts[first], slopes[first])
    for part in torch.nonzero(bound <= distances[first]).flatten().split(max(1, _ENTRIES // len(x))):
        distances[part] = _distances(logs, starts[part], counts[part], slopes[part])
    best = int(distances.argmin())
    return PowerLaw(1 + float(slopes[best]), float(x[starts[best]]), float(distances[best]), int(counts[best]))


def _distances(logs: Tensor, starts: Tensor, counts: Tensor, slopes: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of the tail from each start, (k,)."""
    first = int(starts[0])
    # Below its start a row has a law and a position of zero, and so no distance.
    position = torch.arange(first, len(logs)) - starts[:, None]
    return _gaps(logs[first:], logs[starts], position, counts, slopes)


def _gaps(points: Tensor, start: Tensor, position: Tensor, counts: Tensor, slopes: Tensor) -> Tensor:
    """Largest gap between law and tail over some points of each tail, given by their logarithms and positions."""
    beyond = (points - start[:, None]).clamp_(min=0).mul_(-slopes[:, None]).exp_()
    return beyond.sub_(1).addcdiv_(position.clamp(min=0).to(beyond.dtype), counts[:, None]).abs_().amax(dim=1)
