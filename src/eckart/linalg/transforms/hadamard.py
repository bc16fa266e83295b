"""The orthonormal Walsh-Hadamard transform, for every length.

    y = (H_p ⊗ B) x,   n = p m,   H_p (p, p) Sylvester's matrix of signs over sqrt(p), p a power of two

For a power of two B is 1. Else m is the odd part of n times a power of two, 4 or more, the least for which there is a
Hadamard matrix of Paley: m = q + 1 with a prime q = 3 mod 4, or m = 2 (q + 1) with a prime q = 1 mod 4. Every entry of
the product is then +-1 / sqrt(n). Where no m up to 512 will do, m is the odd part itself and B the cosine transform,
orthonormal but with entries up to sqrt(2 / n).

Reference: R. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import OrthogonalTransform
from .dct import dct, idct

__all__ = ["Hadamard", "hadamard", "inverse_hadamard"]

# One product with H_16 in place of four butterfly passes, 3 to 5 times faster: fewer trips to memory. Up to 64 the
# whole transform is one product.
_RADIX, _ONE_PRODUCT = 16, 64
_LARGEST_BLOCK = 512  # the block is a dense product, m multiplications an entry; beyond, the cosine transform is faster


def hadamard(x: Tensor, dim: int = -1) -> Tensor:
    """Orthonormal Walsh-Hadamard transform along one dimension.

        y = Q x,   |Q_ij| = 1 / sqrt(n) where a Hadamard matrix of size n is at hand,   Qᵀ Q = I

    It spreads every entry evenly over all of y. For n = 2^k it is Sylvester's matrix (natural order, symmetric, its own
    inverse) and takes O(n log n) by a butterfly of radix 16. Other lengths are 2^k times a block, see the module:
    12, 20, 28, 36, 44, 60 and so on times a power of two have entries of one modulus; the others (odd n, twice an odd
    n, 52, ...) use a block of the cosine transform. A block m adds m multiplications an entry, at most 512.
    Differentiable.

    Args:
        x: Any shape, any real float dtype; half precision is computed in float32 and returned as it came.
        dim: The dimension that is transformed.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        LinalgError: ``x`` is not real floating point, or empty along ``dim``.

    Example:
        >>> import torch
        >>> hadamard(torch.tensor([4.0, 0.0, 2.0, 0.0])).tolist()
        [3.0, 3.0, 1.0, 1.0]

    Reference:
        R. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933).
    """
    return Hadamard().forward(x, dim)


def inverse_hadamard(x: Tensor, dim: int = -1) -> Tensor:
    """The inverse and transpose of ``hadamard``; the same map where n is a power of two.

        y = Qᵀ x

    O(n log n) and differentiable like ``hadamard``.

    Args:
        x: Any shape, any real float dtype; half precision is computed in float32 and returned as it came.
        dim: The dimension that is transformed.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        LinalgError: ``x`` is not real floating point, or empty along ``dim``.

    Example:
        >>> import torch
        >>> x = torch.arange(12.0)
        >>> torch.allclose(inverse_hadamard(hadamard(x)), x, atol=1e-5)
        True
    """
    return Hadamard().adjoint(x, dim)


@dataclass(frozen=True)
class Hadamard(OrthogonalTransform):
    """The Walsh-Hadamard transform as an operator: ``hadamard`` forward, ``inverse_hadamard`` adjoint.

    Example:
        >>> (Hadamard().matrix(12) * 12**0.5).abs().unique().round().tolist()
        [1.0]
    """

    def _forward(self, x: Tensor) -> Tensor:
        n, (m, paley) = x.shape[-1], _block(x.shape[-1])
        y = x.reshape(*x.shape[:-1], n // m, m)
        if m > 1:
            y = y @ _paley(m, x).mT if paley else dct(y)
        return _sylvester(y).reshape(x.shape)

    def _adjoint(self, x: Tensor) -> Tensor:
        n, (m, paley) = x.shape[-1], _block(x.shape[-1])
        y = x.reshape(*x.shape[:-1], n // m, m)
        if m > 1:
            y = y @ _paley(m, x) if paley else idct(y)
        return _sylvester(y).reshape(x.shape)


def _sylvester(x: Tensor) -> Tensor:
    """H_p along dimension -2 of x (..., p, m), p a power of two, in factors of Kronecker's product."""
    shape, inner, remaining = x.shape, x.shape[-1], x.shape[-2]
    largest = _RADIX if remaining > _ONE_PRODUCT else remaining
    while remaining > 1:
        radix = min(largest, remaining)
        h = x.new_ones(1, 1)
        while h.shape[0] < radix:
            h = torch.cat((torch.cat((h, h), dim=1), torch.cat((h, -h), dim=1)))
        h = h * (1 / math.sqrt(radix))
        x = x.reshape(-1, radix) @ h if inner == 1 else h @ x.reshape(-1, radix, inner)
        remaining, inner = remaining // radix, inner * radix
    return x.reshape(shape)


def _block(n: int) -> tuple[int, bool]:
    """Size m of the block, and whether it is Paley's matrix (else the cosine transform)."""
    odd = n // (n & -n)
    if odd == 1:
        return 1, False
    m = 4 * odd  # a Hadamard matrix has size 1, 2 or a multiple of 4
    while n % m == 0 and m <= _LARGEST_BLOCK:
        if _paley_prime(m) is not None:
            return m, True
        m *= 2
    return odd, False


def _paley_prime(m: int) -> int | None:
    """The prime q with m = q + 1, q = 3 mod 4, or m = 2 (q + 1), q = 1 mod 4."""
    for q, residue in ((m - 1, 3), (m // 2 - 1, 1)):
        if q % 4 == residue and q > 2 and all(q % divisor for divisor in range(2, math.isqrt(q) + 1)):
            return q
    return None


def _paley(m: int, like: Tensor) -> Tensor:
    """Paley's Hadamard matrix (m, m) over sqrt(m), on the device and in the dtype of ``like``."""
    q = _paley_prime(m)
    assert q is not None
    index = torch.arange(q, device=like.device)
    character = like.new_full((q,), -1.0)  # 1 for squares modulo q, -1 for the others, 0 for 0
    character[index.square() % q] = 1
    character[0] = 0
    core = like.new_ones(q + 1, q + 1)
    core[0, 0] = 0
    core[1:, 1:] = character[(index[:, None] - index) % q]
    if m == q + 1:  # the core is skew
        core[1:, 0] = -1
        h = core + _identity(m, like)
    else:  # the core is symmetric
        h = torch.kron(core, like.new_tensor([[1, 1], [1, -1]]))
        h = h + torch.kron(_identity(q + 1, like), like.new_tensor([[1, -1], [-1, -1]]))
    return h / math.sqrt(m)


def _identity(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)
