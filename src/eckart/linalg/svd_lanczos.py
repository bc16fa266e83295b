"""Golub-Kahan-Lanczos driver of the SVD, thick-restarted and fully reorthogonalised. A pure function.

    a v_j = Σ_{i<=j} b_ij u_i,     aᵀ u_j = Σ_{i<=j} b_ji v_i + β_j v_{j+1}

The SVD of the small upper triangular B gives Ritz triplets; aᵀ u - σ v has norm β_p times the last entry of the
left singular vector of B, so accuracy is known without touching a again.

Reference: Baglama and Reichel, "Augmented implicitly restarted Lanczos bidiagonalization methods", SIAM J. Sci.
Comput. 27 (2005).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import LinalgError
from .svd_direct import Factors

__all__ = ["lanczos"]

_MAX_RESTARTS = 100


def lanczos(a: Tensor, rank: int, energy: float, *, tol: float, generator: torch.Generator) -> Factors:
    """The ``rank`` leading triplets of a well-scaled a (m, n), each with residual at most ``tol * s_1``.

    For few triplets to high accuracy. The right vectors grow to max(2 rank, rank + 20), then the iteration
    restarts from the best. A single starting vector sees one copy of a repeated singular value, so after
    convergence one more round starts from a random vector orthogonal to everything found, and the result
    stands only if nothing new enters. O(m n) a step and O((m + n) p^2) for the orthogonality.

    Args:
        a: (m, n) float32 or float64, well scaled.
        rank: 1 <= rank <= min(m, n).
        energy: Squared Frobenius norm of a.
        tol: Residual norm of each triplet relative to s_1.
        generator: Source of the start vectors, on a's device.

    Raises:
        LinalgError: Not converged after 100 restarts.
    """
    if a.shape[0] < a.shape[1]:
        u, s, vh = lanczos(a.mT, rank, energy, tol=tol, generator=generator)
        return vh.mT, s, u.mT
    m, n = a.shape
    steps = min(n, max(2 * rank, rank + 20))
    kept = min(rank + (steps - rank) // 3, steps - 1)
    floor = 10 * torch.finfo(a.dtype).eps * energy**0.5
    left, right = a.new_zeros(m, steps), a.new_zeros(n, steps + 1)
    projected = a.new_zeros(steps, steps, dtype=torch.float64)
    right[:, 0] = _random(right[:, :0], generator)
    begin, found = 0, None
    for _ in range(_MAX_RESTARTS):
        last = _expand(a, left, right, projected, begin, floor, generator)
        w, s, zh = torch.linalg.svd(projected)
        converged = steps == n or bool((last * w[-1, :rank].abs() <= tol * s[0]).all())
        if converged and (steps == n or (found is not None and bool((s[:rank] <= found * (1 + tol)).all()))):
            u, v = left @ w[:, :rank].to(a.dtype), right[:, :steps] @ zh[:rank].mT.to(a.dtype)
            return u, s[:rank].to(a.dtype), v.mT
        left[:, :kept] = left @ w[:, :kept].to(a.dtype)
        right[:, :kept] = right[:, :steps] @ zh[:kept].mT.to(a.dtype)
        projected = torch.zeros_like(projected)
        projected.diagonal()[:kept] = s[:kept]
        right[:, kept] = _random(right[:, :kept], generator) if converged else right[:, steps]
        begin, found = kept, s[:rank] if converged else None
    raise LinalgError.about("a", a, "Lanczos did not converge", 'raise tol or use driver="exact"')


def _expand(
    a: Tensor, left: Tensor, right: Tensor, projected: Tensor, begin: int, floor: float, generator: torch.Generator
) -> float:
    """Fills columns ``begin`` onward of all three in place; returns the norm of the last residual."""
    norm = 0.0
    for j in range(begin, left.shape[1]):
        left[:, j], coefficients, norm = _append(left[:, :j], a @ right[:, j], floor, generator)
        projected[:j, j], projected[j, j] = coefficients, norm
        if j + 1 == right.shape[0]:
            return 0.0  # the right vectors span the whole space
        right[:, j + 1], _, norm = _append(right[:, : j + 1], a.mT @ left[:, j], floor, generator)
    return norm


def _append(basis: Tensor, vector: Tensor, floor: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """The direction that ``vector`` adds to ``basis``, its coefficients in the basis, and the rest's norm.

    A vector inside the span (an invariant subspace was found) adds a random new direction, with norm 0.
    """
    coefficients = basis.new_zeros(basis.shape[1])
    for _ in range(2):  # twice is enough
        part = basis.mT @ vector
        vector = vector - basis @ part
        coefficients = coefficients + part
    norm = float(torch.linalg.vector_norm(vector))
    if norm <= floor:
        return _random(basis, generator), coefficients.to(torch.float64), 0.0
    return vector / norm, coefficients.to(torch.float64), norm


def _random(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the columns of ``basis`` (m, p), p < m."""
    vector = torch.randn(basis.shape[0], generator=generator, dtype=basis.dtype, device=basis.device)
    for _ in range(3):  # normalised in between: little may be left where the basis fills almost all the space
        vector = vector - basis @ (basis.mT @ vector)
        vector = vector / torch.linalg.vector_norm(vector)
    return vector
