"""The Cayley transform: orthogonal matrices from unconstrained ones.

    Q = (I - A)(I + A)^-1,   A = (P - Pᵀ) / 2,   P (..., n, n) any matrix

It reaches every rotation but those that turn some plane by half a turn (eigenvalue -1), one A for each; Q(0) = I. So P
can be trained without constraint while Q stays orthogonal. The inverse map has the same form, A = (I - Q)(I + Q)^-1.

Reference: A. Cayley, "Sur quelques propriétés des déterminants gauches", J. reine angew. Math. 32 (1846). The way it is
used for adapters: Zhang and Pilanci, "Spectral Adapter: Fine-Tuning in Spectral Space", 2024, arXiv 2405.13952.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._prepare import result_dtype
from ..errors import LinalgError
from .contract import OrthogonalTransform

__all__ = ["Cayley", "cayley", "inverse_cayley"]

# Rounding moves eigenvalues of I + A by eps * ||A||, and Q by the same. Beyond this Q would no longer be orthogonal.
_LARGEST_LOSS = 1e-2


def cayley(parameter: Tensor) -> Tensor:
    """Orthogonal matrix of an unconstrained square one.

        Q = (I - A)(I + A)^-1,   A = (parameter - parameterᵀ) / 2,   Qᵀ Q = I,   det Q = 1

    One solve, O(n^3), always possible because the eigenvalues of A are imaginary. An eigenvalue i tan(t / 2) of A turns
    its plane by -t. Q is orthogonal to a few eps * (1 + ||A||). Differentiable; for small A, Q = I - 2 A + 2 A^2 - ...

    Args:
        parameter: (..., n, n), any real float dtype; only its skew part counts. Half precision is computed and, since
            this is a matrix and not a transformed vector, returned in float32: rounded to 8 bits it is not orthogonal.

    Returns:
        Q (..., n, n), in float64 for float64 input and float32 otherwise.

    Raises:
        LinalgError: Not a square float matrix, NaN or Inf in it, or so large that Q could not be told to 1 %
            (n * max |A| above 8e4 in float32).

    Example:
        >>> import torch
        >>> cayley(torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).tolist()  # tan(45 degrees), so a quarter turn
        [[0.0, -1.0], [1.0, 0.0]]

    Reference:
        A. Cayley, "Sur quelques propriétés des déterminants gauches", J. reine angew. Math. 32 (1846).
    """
    work = _square(parameter, "parameter")
    skew = (work - work.mT) / 2
    if not _well_inside(skew):
        raise LinalgError.about(
            "parameter", parameter, "has NaN, Inf or too large a skew part", "scale it down, or pass it as float64"
        )
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity + skew, identity - skew)


def inverse_cayley(q: Tensor) -> Tensor:
    """The skew-symmetric matrix whose Cayley transform is ``q``.

        A = (I - q)(I + q)^-1,   Aᵀ = -A,   cayley(A) = q

    Rotation angles near half a turn give large entries, tan(t / 2). O(n^3). Differentiable.

    Args:
        q: (..., n, n) orthogonal to 1 %, any real float dtype (half precision is computed and returned in float32).

    Returns:
        A (..., n, n), exactly skew, in float64 for float64 input and float32 otherwise.

    Raises:
        LinalgError: ``q`` is not a square float matrix, not orthogonal (or has NaN), or has an eigenvalue -1 to its
            precision, as every matrix of determinant -1 has: no Cayley transform reaches it.

    Example:
        >>> import torch
        >>> inverse_cayley(torch.tensor([[0.0, -1.0], [1.0, 0.0]])).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    work = _square(q, "q")
    identity = torch.eye(work.shape[-1], dtype=work.dtype, device=work.device)
    if not bool(((work.mT @ work - identity).abs() <= 1e-2).all()):  # false for NaN
        raise LinalgError.about("q", q, "is not orthogonal", "take the q factor of eckart.linalg.qr(q)")
    solution, info = torch.linalg.solve_ex(identity + work, identity - work)
    skew, symmetric = (solution - solution.mT) / 2, (solution + solution.mT) / 2
    # At an eigenvalue -1 the solution is not finite, or huge, or (a reflection, blurred by rounding) far from skew.
    if bool(info.any()) or not _well_inside(solution) or not bool((_size(symmetric) <= (1 + _size(skew)) / 10).all()):
        raise LinalgError.about(
            "q", q, "has an eigenvalue -1, which no Cayley transform reaches", "change the sign of some of its columns"
        )
    return skew


@dataclass(frozen=True, eq=False)
class Cayley(OrthogonalTransform):
    """A trainable rotation as an operator: multiplication by ``cayley(parameter)``.

    The matrix is made in every call, O(n^3), so gradients reach ``parameter`` as it is now; x should have n vectors or
    more to be worth it. At zero it is the identity.

    Attributes:
        parameter: (n, n), or (..., n, n) against x (..., m, n) as in ``x @ matrix``; any real float dtype.

    Example:
        >>> import torch
        >>> parameter = torch.zeros(4, 4, requires_grad=True)
        >>> Cayley(parameter)(torch.ones(2, 4)).square().sum().backward()
        >>> parameter.grad.abs().max().item()  # a rotation changes no norm
        0.0
    """

    parameter: Tensor

    def _parameter(self) -> Tensor:
        return self.parameter

    def _forward(self, x: Tensor) -> Tensor:
        return x @ cayley(self.parameter.to(x.dtype)).mT

    def _adjoint(self, x: Tensor) -> Tensor:
        return x @ cayley(self.parameter.to(x.dtype))


def _square(a: Tensor, name: str) -> Tensor:
    if not a.is_floating_point():
        raise LinalgError.about(name, a, "is not real floating point", "convert it with .float() first")
    if a.ndim < 2 or a.shape[-2] != a.shape[-1]:
        raise LinalgError.about(name, a, "is not square", "give it as many rows as columns")
    return a.to(result_dtype(a))


def _well_inside(skew: Tensor) -> bool:
    """Whether rounding in I + skew loses at most 1 %; false for NaN."""
    return bool((_size(skew) * (skew.shape[-1] * torch.finfo(skew.dtype).eps) <= _LARGEST_LOSS).all())


def _size(a: Tensor) -> Tensor:
    """Largest magnitude in each matrix of a (..., n, n)."""
    return torch.linalg.vector_norm(a, ord=float("inf"), dim=(-2, -1)) if a.numel() else a.new_zeros(a.shape[:-2])
