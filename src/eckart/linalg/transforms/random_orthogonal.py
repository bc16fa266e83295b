"""Random orthogonal maps: uniform over the orthogonal group, and a cheap one that mixes nearly as well.

    uniform:             Q (n, n) from the QR factorisation of a Gaussian matrix, O(n^3) to draw, O(n^2) to apply
    randomised Hadamard: Q = H diag(signs), O(n) to draw, O(n log n) to apply, n numbers of one byte to keep

Reference: F. Mezzadri, "How to generate random matrices from the classical compact groups", Notices AMS 54 (2007);
N. Ailon and B. Chazelle, "The fast Johnson-Lindenstrauss transform", SIAM J. Comput. 39 (2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LinalgError
from ..solve import qr
from .contract import OrthogonalTransform
from .hadamard import hadamard, inverse_hadamard

__all__ = ["RandomOrthogonal", "RandomizedHadamard", "random_orthogonal"]


def random_orthogonal(
    n: int,
    k: int | None = None,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random matrix with orthonormal columns, uniform (Haar) distribution.

        Qᵀ Q = I,   Q (n, k); Q and U Q have the same distribution for every orthogonal U

    The Q factor of a Gaussian matrix whose R has a positive diagonal; without that choice of signs it is not uniform.
    O(n k^2). Drawn and factorised in float64, then rounded, so a seed gives the same matrix in every dtype.

    Args:
        n: Rows, at least 1.
        k: Columns, 1 to n; None for n.
        generator: Source of randomness; None means a private one with a fixed seed, so the result repeats.
        dtype: Of the result.
        device: Of the result; by default the generator's, or the CPU.

    Raises:
        ValueError: n or k out of range.

    Example:
        >>> import torch
        >>> q = random_orthogonal(5, 2)
        >>> torch.allclose(q.mT @ q, torch.eye(2), atol=1e-6)
        True

    Reference:
        F. Mezzadri, "How to generate random matrices from the classical compact groups", Notices AMS 54 (2007).
    """
    k = n if k is None else k
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to n, not {k} with n = {n}")
    generator, device = _source(generator, device)
    gaussian = torch.randn(n, k, generator=generator, dtype=torch.float64, device=generator.device)
    return qr(gaussian).q.to(device=device, dtype=dtype)


@dataclass(frozen=True, eq=False)
class RandomOrthogonal(OrthogonalTransform):
    """A dense random orthogonal matrix as an operator; ``RandomOrthogonal.draw(n)`` makes one.

    Attributes:
        q: The matrix (n, n). In float32 it is orthogonal to 1e-6, for float64 input too.

    Example:
        >>> import torch
        >>> rotate = RandomOrthogonal.draw(8)
        >>> x = torch.ones(3, 8)
        >>> torch.allclose(rotate(x).norm(dim=-1), x.norm(dim=-1))
        True
    """

    q: Tensor

    def __post_init__(self) -> None:
        if self.q.ndim != 2 or self.q.shape[0] != self.q.shape[1]:
            raise LinalgError.about("q", self.q, "is not one square matrix", "make it by RandomOrthogonal.draw(n)")

    @classmethod
    def draw(
        cls,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RandomOrthogonal:
        """Draws the matrix by ``random_orthogonal``, which explains the arguments."""
        return cls(random_orthogonal(n, generator=generator, dtype=dtype, device=device))

    def _parameter(self) -> Tensor:
        return self.q

    def _forward(self, x: Tensor) -> Tensor:
        return x @ self.q.to(x.dtype).mT

    def _adjoint(self, x: Tensor) -> Tensor:
        return x @ self.q.to(x.dtype)


@dataclass(frozen=True, eq=False)
class RandomizedHadamard(OrthogonalTransform):
    """Random signs, then the Walsh-Hadamard transform; ``RandomizedHadamard.draw(n)`` makes one.

        Q = H diag(signs)

    For any x that does not depend on the signs the entries of Q x are about equally large: with probability 1 - p none
    exceeds ``sqrt(2 log(2 n / p) / n) ||x||`` where the entries of H have one modulus, and sqrt(2) times that at the
    other lengths (see ``hadamard``).

    Attributes:
        signs: (n,) of 1 and -1, any dtype.

    Example:
        >>> import torch
        >>> spike = torch.zeros(64)
        >>> spike[3] = 8.0
        >>> RandomizedHadamard.draw(64)(spike).abs().unique().tolist()
        [1.0]

    Reference:
        N. Ailon and B. Chazelle, "The fast Johnson-Lindenstrauss transform", SIAM J. Comput. 39 (2009).
    """

    signs: Tensor

    @classmethod
    def draw(
        cls, n: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> RandomizedHadamard:
        """Draws the signs, one byte each.

        Args:
            n: Length, at least 1.
            generator: Source of randomness; None means a private one with a fixed seed, so the result repeats.
            device: Of the signs; by default the generator's, or the CPU.

        Raises:
            ValueError: n below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        generator, device = _source(generator, device)
        bits = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8, device=generator.device)
        return cls((2 * bits - 1).to(device))

    def _parameter(self) -> Tensor:
        return self.signs

    def _forward(self, x: Tensor) -> Tensor:
        return hadamard(x * self.signs.to(x.dtype))

    def _adjoint(self, x: Tensor) -> Tensor:
        return inverse_hadamard(x) * self.signs.to(x.dtype)


def _source(
    generator: torch.Generator | None, device: torch.device | str | None
) -> tuple[torch.Generator, torch.device | str]:
    """The generator to draw from, and the device of the result."""
    if generator is not None:
        return generator, device or generator.device
    device = device or "cpu"
    return torch.Generator(device=device).manual_seed(0), device
