"""Orthonormal discrete wavelet transforms with periodic boundary, in O(n) for every length.

    a_k = sum_j h_j x_(2k+j),   d_k = sum_j g_j x_(2k+j),   g_j = (-1)^j h_(2p-1-j),   indices modulo n

One level maps n entries to n/2 averages a and n/2 details d; the next level does the same to a. The filters are not
stored as h but as p plane rotations with shifts between them (the lattice of the filter bank), which is half the
arithmetic, and orthonormal whatever the rounding of the angles.

Reference: I. Daubechies, "Orthonormal bases of compactly supported wavelets", Comm. Pure Appl. Math. 41 (1988);
P. Vaidyanathan and P.-Q. Hoang, "Lattice structures for optimal design and robust implementation of two-channel
perfect-reconstruction QMF banks", IEEE Trans. ASSP 36 (1988).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .contract import OrthogonalTransform

__all__ = ["Wavelet", "WaveletName", "inverse_wavelet", "wavelet"]

WaveletName = Literal["haar", "db2", "db3", "db4"]

# Tangents of the rotation angles, first stage first. They are pi/4; pi/6 and pi/12; for db3 and db4 from the spectral
# factorisation of Daubechies' polynomial (roots inside the unit circle) in 60 digits.
_TANGENTS: dict[str, tuple[float, ...]] = {
    "haar": (1.0,),
    "db2": (1 / math.sqrt(3), 2 - math.sqrt(3)),
    "db3": (0.41228659505180555431, 0.5460964029793958055, -0.10588941994813487276),
    "db4": (0.32227588800028112285, 0.81093134449390483858, -0.25929388162988974607, 0.046000097113777892609),
}


def wavelet(x: Tensor, name: WaveletName = "haar", *, levels: int | None = None, dim: int = -1) -> Tensor:
    """Orthonormal discrete wavelet transform along one dimension.

        y = Q x = [a_L | d_L | d_(L-1) | ... | d_1],   Qᵀ Q = I

    The approximation band a_L holds local averages over 2^L entries (times 2^(L/2)), the detail bands what is left at
    each scale, coarse to fine. ``Wavelet(name, levels).bands(y)`` cuts y into them. O(p n), p = 1 for Haar and the
    number after "db" for the others. Differentiable.

    A level whose input has odd length passes the last entry on to its average band unchanged, so the map stays
    orthonormal and the bands of n entries have ceil(n / 2^L) and floor(ceil(n / 2^(l-1)) / 2) entries. Where a level is
    shorter than the filter, the filter wraps around; the map stays orthonormal.

    Args:
        x: Any shape, any real float dtype; half precision is computed in float32 and returned as it came.
        name: "haar", or "db2" to "db4": Daubechies' filters with 2p taps and p vanishing moments (the details of
            a polynomial of degree below p are zero, away from the ends).
        levels: Number L of levels, 0 for none; None for as many as possible, until one average is left.
        dim: The dimension that is transformed.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        LinalgError: ``x`` is not real floating point, or empty along ``dim``.
        ValueError: Unknown name, or more levels than the length has.

    Example:
        >>> import torch
        >>> y = wavelet(torch.tensor([4.0, 2.0, 5.0, 5.0]), levels=1)
        >>> [round(value, 4) for value in y.tolist()]  # sums and differences over the square root of 2
        [4.2426, 7.0711, 1.4142, 0.0]

    Reference:
        I. Daubechies, "Orthonormal bases of compactly supported wavelets", Comm. Pure Appl. Math. 41 (1988).
    """
    return Wavelet(name, levels).forward(x, dim)


def inverse_wavelet(x: Tensor, name: WaveletName = "haar", *, levels: int | None = None, dim: int = -1) -> Tensor:
    """The inverse and transpose of ``wavelet``: from the bands back to the signal.

        y = Qᵀ x,   x = [a_L | d_L | ... | d_1]

    O(p n) and differentiable like ``wavelet``.

    Args:
        x: Any shape, any real float dtype; half precision is computed in float32 and returned as it came.
        name: As given to ``wavelet``.
        levels: As given to ``wavelet``.
        dim: The dimension that holds the bands.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        LinalgError: ``x`` is not real floating point, or empty along ``dim``.
        ValueError: Unknown name, or more levels than the length has.

    Example:
        >>> import torch
        >>> x = torch.arange(5.0)
        >>> torch.allclose(inverse_wavelet(wavelet(x, "db2"), "db2"), x, atol=1e-6)
        True
    """
    return Wavelet(name, levels).adjoint(x, dim)


@dataclass(frozen=True)
class Wavelet(OrthogonalTransform):
    """A wavelet transform as an operator: ``wavelet`` forward, ``inverse_wavelet`` adjoint.

    Attributes:
        name: "haar", "db2", "db3" or "db4".
        levels: Number of levels; None for as many as the length allows.

    Example:
        >>> import torch
        >>> transform, gradient = Wavelet("haar", levels=2), torch.ones(3, 10)
        >>> approximation, *details = transform.bands(transform(gradient))
        >>> approximation.shape, [band.shape[-1] for band in details]
        (torch.Size([3, 3]), [2, 5])
    """

    name: WaveletName = "haar"
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(WaveletName):
            raise ValueError(f"name must be one of {', '.join(get_args(WaveletName))}, not {self.name!r}")
        if self.levels is not None and self.levels < 0:
            raise ValueError(f"levels must be at least 0, not {self.levels}; leave it out for as many as possible")

    def sizes(self, n: int) -> tuple[int, ...]:
        """Lengths of the bands [a_L, d_L, ..., d_1] of n entries.

        Raises:
            ValueError: n entries have fewer levels.

        Example:
            >>> Wavelet("haar").sizes(10)
            (1, 1, 1, 2, 5)
        """
        most = max(n - 1, 0).bit_length()  # halving and rounding up so often leaves 1
        if self.levels is not None and self.levels > most:
            raise ValueError(f"levels must be at most {most} for {n} entries, not {self.levels}")
        details = []
        for _ in range(most if self.levels is None else self.levels):
            details.append(n // 2)
            n -= n // 2
        return n, *reversed(details)

    def bands(self, y: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
        """Views (a_L, d_L, ..., d_1) of a transformed ``y``, cut along ``dim``."""
        return y.split(self.sizes(y.size(dim)), dim=dim)

    def _forward(self, x: Tensor) -> Tensor:
        tangents, gain = _TANGENTS[self.name], _gain(self.name)
        details: list[Tensor] = []
        for size in reversed(self.sizes(x.shape[-1])[1:]):
            low, high, last = x[..., 1 : 2 * size : 2], x[..., : 2 * size : 2], x[..., 2 * size :]
            for stage, tangent in enumerate(tangents):
                high = high.roll(-1, dims=-1) if stage else high  # brings in the next two taps
                low, high = torch.add(low, high, alpha=tangent), torch.sub(high, low, alpha=tangent)
            x = torch.cat((low * gain, last), dim=-1)
            details.append(high * gain)
        return torch.cat((x, *reversed(details)), dim=-1)

    def _adjoint(self, x: Tensor) -> Tensor:
        tangents, gain = _TANGENTS[self.name], _gain(self.name)
        average, *details = self.bands(x)
        for detail in details:
            size = detail.shape[-1]
            low, high, last = average[..., :size] * gain, detail * gain, average[..., size:]
            for stage, tangent in reversed(list(enumerate(tangents))):
                low, high = torch.sub(low, high, alpha=tangent), torch.add(high, low, alpha=tangent)
                high = high.roll(1, dims=-1) if stage else high
            average = low.new_empty(*low.shape[:-1], 2 * size + last.shape[-1])
            average[..., 1 : 2 * size : 2], average[..., : 2 * size : 2], average[..., 2 * size :] = low, high, last
        return average


def _gain(name: str) -> float:
    """Product of the cosines: the rotations are applied as [[1, t], [-t, 1]], which is 1 / cos too long."""
    return math.prod([1 / math.sqrt(1 + tangent * tangent) for tangent in _TANGENTS[name]])
