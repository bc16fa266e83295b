"""Orthonormal directions outside a subspace, kept as sparse vectors minus combinations of the subspace's basis.

    q = b - v w,   w = vᵀ b,   qᵀ q' = bᵀ b' - wᵀ w'           v (n, k) orthonormal, b (n, l) sparse, w (k, l)

for the part (I - v vᵀ) eᵀ of a block e (r, n) outside span(v). With h = eᵀ - v c, c = vᵀ eᵀ, the products are h p =
(eᵀ p, c p) as a pair, and hᵀ q = e b - cᵀ w, so v is never touched and b lives in the nonzero columns of e.

Reference: Deng et al., arXiv:2401.09703; Vecharynski and Saad, "Fast updating algorithms for latent semantic
indexing", SIAM J. Matrix Anal. Appl. 35 (2014), for "gkl"; Yamazaki, Tomov and Dongarra, "Sampling algorithms to
update truncated SVD", IEEE Big Data (2017), for "rpi".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._basis import orthonormalize
from ._sparse import Compressed
from .eigh import eigh
from .svd import singular_values
from .svd_operator import leading_eigenvectors

__all__ = ["Directions", "FactoredBasis", "exact", "golub_kahan", "leading", "orthonormal", "power_iteration"]

# Condition number of the small factor of a basis from which it is multiplied out: the stored rows grow with it.
_CONDITION = {torch.float32: 1e3, torch.float64: 1e6}


class Directions(NamedTuple):
    """An orthonormal basis [v q], q = b - v w, and the rows of e in it: e ≈ coordinatesᵀ [v q]ᵀ.

    Attributes:
        columns: (p,) the rows in which b is not zero: the nonzero columns of e.
        b: (p, l) those rows.
        w: (k, l).
        coordinates: (k + l, r).
        lost: Squared Frobenius norm of the part of e outside the basis.
    """

    columns: Tensor
    b: Tensor
    w: Tensor
    coordinates: Tensor
    lost: float


def exact(e: Compressed, c: Tensor, tol: float) -> Directions:
    """All of h = q xᵀ, l <= r: O(p r^2 + r^3), and e becomes dense (r, p)."""
    return _directions(e, c, *orthonormal(e.adjoint.to_dense(), c, tol))._replace(lost=0.0)


def leading(e: Compressed, c: Tensor, tol: float, s: Tensor, rank: int, generator: torch.Generator) -> Directions:
    """Those of h that the ``rank`` leading right singular vectors of a = [diag(s) vᵀ; e] have a part in.

    They are aᵀ f for the leading eigenvectors f of a aᵀ, which block Lanczos iteration finds to the accuracy of
    rounding, from products with e, c and their transposes.
    """
    k = s.shape[0]

    def gram(x: Tensor) -> Tensor:
        head, tail = s[:, None] * x[:k], x[k:]
        return torch.cat([s[:, None] * (head + c @ tail), c.mT @ head + e.matrix @ (e.adjoint @ tail)])

    p = leading_eigenvectors(gram, k + c.shape[1], rank, tol=1e-12, dtype=c.dtype, generator=generator)[k:]
    return _directions(e, c, *orthonormal(e.adjoint @ p, c @ p, tol))


def power_iteration(
    e: Compressed, c: Tensor, tol: float, size: int, rounds: int, generator: torch.Generator
) -> Directions:
    """About the ``size`` leading left singular vectors of h, by ``rounds`` of subspace iteration."""
    x = torch.randn(c.shape[1], size, generator=generator, dtype=c.dtype, device=c.device)
    for _ in range(rounds):
        p, _ = orthonormalize(x)
        b, w = orthonormal(e.adjoint @ p, c @ p, tol)
        x = e.matrix @ b - c.mT @ w
    return _directions(e, c, b, w)


def golub_kahan(e: Compressed, c: Tensor, tol: float, size: int, generator: torch.Generator) -> Directions:
    """The Krylov space of h from a random start, after at most ``size`` steps; fewer where it is exhausted."""
    p = torch.randn(c.shape[1], 1, generator=generator, dtype=c.dtype, device=c.device)
    seen, b, w = p[:, :0], c.new_empty(e.columns.numel(), 0), c[:, :0]
    for _ in range(size):
        length = torch.linalg.vector_norm(p)
        for _ in range(2):  # twice is enough
            p = p - seen @ (seen.mT @ p)
        if not float(torch.linalg.vector_norm(p)) > tol * float(length):
            break
        p = p / torch.linalg.vector_norm(p)
        new_b, new_w = e.adjoint @ p, c @ p
        length = new_b.square().sum()
        for _ in range(2):
            overlap = b.mT @ new_b - w.mT @ new_w
            new_b, new_w = new_b - b @ overlap, new_w - w @ overlap
        square = new_b.square().sum() - new_w.square().sum()
        if not float(square) > tol * float(length):
            break
        seen, b = torch.cat([seen, p], dim=1), torch.cat([b, new_b / square.sqrt()], dim=1)
        w = torch.cat([w, new_w / square.sqrt()], dim=1)
        p = e.matrix @ b[:, -1:] - c.mT @ w[:, -1:]
    return _directions(e, c, b, w)


def _directions(e: Compressed, c: Tensor, b: Tensor, w: Tensor) -> Directions:
    x = e.matrix @ b - c.mT @ w
    coordinates = torch.cat([c, x.mT])
    return Directions(e.columns, b, w, coordinates, max(0.0, e.energy - float(coordinates.square().sum())))


def orthonormal(b: Tensor, w: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """A basis of the span of b - v w in the same form; what is below ``tol`` of b's squared length is left out.

    From the Gram matrix bᵀ b - wᵀ w, which is exact only up to the rounding of bᵀ b: Gram-Schmidt column by column
    has the same limit, and takes as many steps as there are columns.
    """
    norms = torch.linalg.vector_norm(b, dim=0)
    used = norms > 0
    b, w = b[:, used] / norms[used], w[:, used] / norms[used]
    gram = b.mT @ b - w.mT @ w
    lower, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0 or not bool((lower.diagonal().square() > 1e-2).all()):
        values, vectors = eigh((gram + gram.mT) / 2)
        wanted = values > tol
        step = vectors[:, wanted] / values[wanted].sqrt()
        b, w = b @ step, w @ step
        lower, info = torch.linalg.cholesky_ex(b.mT @ b - w.mT @ w)  # takes the error eps / tol out again
        if int(info) != 0:
            return b, w
    return tuple(torch.linalg.solve_triangular(lower.mT, part, upper=True, left=False) for part in (b, w))


class FactoredBasis:
    """An orthonormal basis in two factors, stored (count, k) @ small (k, k): U K or V L of the paper.

    A rotation changes the small factor, and rows are changed or appended as rows @ small^-1.

    Args:
        basis: (count, k) orthonormal columns.
    """

    def __init__(self, basis: Tensor) -> None:
        self.count, self.dtype = basis.shape[0], basis.dtype
        self._stored = basis.contiguous()  # rows beyond the first ``count`` are reserved
        self._small = torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)

    def basis(self) -> Tensor:
        """(count, k), multiplied out."""
        return self._stored[: self.count] @ self._small.to(self.dtype)

    def take(self, index: Tensor) -> Tensor:
        """Rows of the basis, float64."""
        return self._stored[: self.count][index].to(torch.float64) @ self._small

    def rotate(self, g: Tensor, new: Directions | None = None) -> None:
        """basis <- [basis q] g, with the new directions q = b - basis w."""
        k = self._small.shape[0]
        small = self._small @ (g[:k] if new is None else g[:k] - new.w @ g[k:])
        if _is_safe(small, _CONDITION[self.dtype]):
            self._small = small
        else:
            self._stored = self._stored[: self.count] @ small.to(self.dtype)
            self._small = torch.eye(g.shape[1], dtype=torch.float64, device=g.device)
        if new is not None:
            self._stored[new.columns] += self._inner(new.b @ g[k:])

    def append(self, rows: Tensor) -> None:
        """Appends rows (r, k) to the basis."""
        needed = self.count + rows.shape[0]
        if needed > self._stored.shape[0]:
            grown = self._stored.new_empty(max(needed, self.count * 3 // 2), self._stored.shape[1])
            grown[: self.count] = self._stored[: self.count]
            self._stored = grown
        self._stored[self.count : needed] = self._inner(rows)
        self.count = needed

    def _inner(self, rows: Tensor) -> Tensor:
        """rows @ small^-1, as they are stored."""
        return torch.linalg.solve(self._small, rows, left=False).to(self.dtype)


def _is_safe(small: Tensor, condition: float) -> bool:
    """Whether a factor is square and can be solved with."""
    if small.shape[0] != small.shape[1]:
        return False
    s = singular_values(small)
    return s.numel() == 0 or float(s[0]) < condition * float(s[-1])
