"""Leading singular triplets of a matrix known by its products only: a sparse one, a sum, a product of others.

    a v_i = s_i u_i,   ||aᵀ u_i - s_i v_i|| = residual_i,   i = 1 ... k

Block Lanczos iteration on the Gram matrix of the smaller side, with full orthogonalisation and thick restarts: when the
basis is full, the best Ritz vectors stay and the last block goes on. A last Rayleigh-Ritz step takes the triplets from
a v itself, so the singular values do not suffer from the squaring in the Gram matrix. Only vectors of the smaller side
are kept, about 3 k of them, and all the work is in products of blocks.

Reference: Golub and Underwood, "The block Lanczos method for computing eigenvalues", in Mathematical Software III,
Academic Press (1977); Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J.
Matrix Anal. Appl. 22 (2000). The projected matrix comes from inner products with the whole basis instead of their
recurrence, so a restart is no special case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._basis import column_signs, extend, orthonormalize
from ._prepare import all_finite, rescale
from .eigh import eigh
from .errors import LinalgError
from .svd import svd

__all__ = ["OperatorSVD", "leading_eigenvectors", "svd_operator"]

_TOL = {torch.float32: 1e-5, torch.float64: 1e-8}
_MAX_RESTARTS = 200


class OperatorSVD(NamedTuple):
    """Leading singular triplets of a linear operator.

    Attributes:
        u: (m, k) orthonormal columns; the entry of largest magnitude in each is positive.
        s: (k,) singular values, descending.
        vh: (k, n) orthonormal rows.
        residual: (k,) float64, norms of ``aᵀ u_i - s_i v_i``, or where m < n of ``a v_i - s_i u_i``; of the two
            equations the other one holds. Each s_i is that close to a singular value of a.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    residual: Tensor

    @property
    def rank(self) -> int:
        """Number k of triplets."""
        return self.s.shape[0]

    def reconstruct(self) -> Tensor:
        """u diag(s) vh, (m, n)."""
        return (self.u * self.s) @ self.vh


def svd_operator(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    rank: int,
    *,
    tol: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> OperatorSVD:
    """The ``rank`` leading singular triplets of a matrix a (m, n) given by its products.

        a ≈ u diag(s) vh,   u (m, k), s (k,), vh (k, n)

    As accurate as ``scipy.sparse.linalg.svds``, in up to twice its time on sparse matrices: it also looks for further
    copies of repeated singular values. Work a step: one product with a and one with aᵀ on max(4, k / 8) vectors, and
    O(min(m, n) k^2) for the orthogonality. Where min(m, n) is not much larger than 3 k, the Gram matrix is formed and
    decomposed. Singular values below eps^(1/2) s_1 cannot be told from zero. Not differentiable.

    Args:
        matvec: x (n, b) -> a x (m, b).
        rmatvec: y (m, b) -> aᵀ y (n, b).
        shape: (m, n).
        rank: Number k of triplets; at most min(m, n) are returned.
        tol: Ends the iteration when all residuals are below tol * s_1, or below 50 eps s_1^2 / s_i, all that can be
            had. The error of s_i is of the order of the square of that, the error of the vectors is that over the gap
            to the next singular value. Default 1e-8 in float64, 1e-5 in float32.
        dtype: float64 or float32; what the products take and return.
        device: Where the products take place.
        generator: Source of the random start, on ``device``. None means a private one with a fixed seed.

    Returns:
        The triplets and their residuals.

    Raises:
        LinalgError: A product returns NaN or Inf, or the iteration does not converge.
        ValueError: rank below 1, tol not positive, unknown dtype, or a product of the wrong shape.

    Example:
        >>> import torch
        >>> d = torch.arange(1000.0, 0.0, -1.0, dtype=torch.float64)[:, None]
        >>> result = svd_operator(lambda x: d * x, lambda y: d * y, (1000, 1000), rank=3)
        >>> [round(value, 6) for value in result.s.tolist()]
        [1000.0, 999.0, 998.0]

    Reference:
        Golub and Underwood (1977); Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if dtype not in _TOL:
        raise ValueError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
    tol = _TOL[dtype] if tol is None else tol
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    m, n = shape
    if m < n:
        u, s, vh, residual = svd_operator(
            rmatvec, matvec, (n, m), rank, tol=tol, dtype=dtype, device=device, generator=generator
        )
        return _signed(vh.mT, s, u.mT, residual)
    rank, generator = min(rank, n), generator or torch.Generator(device=device).manual_seed(0)
    start = torch.randn(n, 1, generator=generator, dtype=dtype, device=device)
    image = _checked(matvec(start), (m, 1), "matvec")
    _checked(rmatvec(image.sign()), (n, 1), "rmatvec")
    # A power of two, so that the Gram matrix neither overflows nor underflows.
    scale = torch.frexp(image.abs().amax().to(torch.float64)).exponent.to(torch.float64).exp2()
    inverse = (1 / scale).to(dtype)

    def gram(x: Tensor) -> Tensor:
        return rmatvec(matvec(x) * inverse) * inverse

    v = leading_eigenvectors(gram, n, rank, tol=tol, dtype=dtype, generator=generator)
    # In float64, because this is where the singular values come from.
    v, _ = orthonormalize(v.to(torch.float64))
    q, r = orthonormalize(matvec(v.to(dtype)).to(torch.float64) / scale)
    left, s, right, _ = svd(r, driver="exact")
    u, vh = (q @ left).to(dtype), (right @ v.mT).to(dtype)
    s = rescale(s, scale, "singular values", dtype)
    return _signed(u, s, vh, torch.linalg.vector_norm((rmatvec(u) - vh.mT * s).to(torch.float64), dim=0))


def leading_eigenvectors(
    gram: Callable[[Tensor], Tensor], n: int, rank: int, *, tol: float, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Orthonormal (n, rank), for the largest eigenvalues l_i of the positive semidefinite matrix with product ``gram``.

    The residual of each is below tol * (l_1 l_i)^(1/2), or below 50 eps l_1 if that is larger. Where n is not much
    larger than 3 * rank, the matrix is formed.
    """
    block, device, eps = max(4, rank // 8), generator.device, torch.finfo(dtype).eps
    limit = 3 * rank + 8 * block
    if limit + block > n:
        return eigh(gram(torch.eye(n, dtype=dtype, device=device)), rank).vectors

    def draw(basis: Tensor) -> Tensor:
        return extend(basis, torch.randn(n, block, generator=generator, dtype=dtype, device=device))[1]

    basis = torch.empty(n, 0, dtype=dtype, device=device)
    projected = basis.new_empty(0, 0, dtype=torch.float64)
    fresh, found = draw(basis), None
    for _ in range(_MAX_RESTARTS):
        while basis.shape[1] + block <= limit:
            basis = torch.cat([basis, fresh], dim=1)
            coupling, fresh, growth = extend(basis, gram(fresh))
            new = coupling[:-block]
            projected = torch.cat([torch.cat([projected, new], dim=1), torch.cat([new.mT, coupling[-block:]], dim=1)])
            if float(growth.abs().max()) <= 10 * eps * float(projected.abs().max()):
                fresh, growth = draw(basis), torch.zeros_like(growth)  # an invariant space; the new block was noise
        values, vectors = eigh((projected + projected.mT) / 2)
        leading = values[:rank].clamp(min=0)
        enough = (tol * (leading * values[0]).sqrt()).clamp(min=50 * eps * float(values[0]))
        converged = bool((torch.linalg.vector_norm(growth @ vectors[-block:, :rank], dim=0) <= enough).all())
        if converged and found is not None and bool((leading <= found + enough).all()):
            return basis @ vectors[:, :rank].to(dtype)
        kept = rank + (limit - rank) // 3
        basis, projected = basis @ vectors[:, :kept].to(dtype), torch.diag(values[:kept])
        if converged:
            # A start block sees as many copies of a repeated eigenvalue as it has columns: another one must add none.
            fresh, found = draw(basis), leading
    raise LinalgError.about("operator", basis, f"no convergence after {_MAX_RESTARTS} restarts", "raise tol")


def _checked(product: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    if tuple(product.shape) != shape:
        raise ValueError(f"{name} must return shape {shape}, not {tuple(product.shape)}")
    if not all_finite(product):
        raise LinalgError.about(f"{name}'s result", product, "contains NaN or Inf", "find where it comes from")
    return product


def _signed(u: Tensor, s: Tensor, vh: Tensor, residual: Tensor) -> OperatorSVD:
    signs = column_signs(u)
    return OperatorSVD(u * signs, s, vh * signs.mT, residual)
