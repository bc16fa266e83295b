"""Randomized block Krylov driver of the SVD. A pure function.

    q_0 = orth(a Ω),  p_0 = orth(aᵀ q_0),  q_1 = orth(a p_0 minus q_0),  p_1 = orth(aᵀ q_1 minus p_0), ...

With U = [q_0 q_1 ...], V = [p_0 p_1 ...] the small matrix B = Uᵀ a V satisfies a V = U B (or aᵀ U = V Bᵀ, in
alternation), so its SVD gives the best approximation of a inside the space and its exact error. After the same
number of products with a this is far more accurate than subspace iteration, which forgets q_0 for q_1.

Reference: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
arXiv:0909.4061; Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular
value decomposition", NeurIPS 2015, arXiv:1504.05477.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._basis import extend, orthonormalize
from .svd_direct import Factors, exact, gram

__all__ = ["OVERSAMPLING", "randomized"]

OVERSAMPLING = 8  # columns beyond the wanted rank in each block
_SMALLEST_BLOCK = 16  # a product with fewer columns takes as long: it is bound by reading a
_HIDDEN = 7  # products to make where the gains drown in rounding: enough for every spectrum tried, 4 are not


def randomized(a: Tensor, rank: int, energy: float, *, tol: float, generator: torch.Generator) -> Factors:
    """The ``rank`` leading triplets of a (m, n), with a Frobenius error within ``tol`` of the best.

    Every product with a tells how much energy (sum of squares) the top ``rank`` directions have captured; the
    iteration stops when the energy still to come, extrapolated as a geometric series from the last gains,
    would change the error by less than ``tol``. Complexity O(m n rank) a product, 4 to 7 products as a rule. Where
    the space would outgrow min(m, n) a direct driver is cheaper and takes over.

    Args:
        a: (m, n) float32 or float64, well scaled.
        rank: 1 <= rank <= min(m, n).
        energy: Squared Frobenius norm of a.
        tol: Allowed relative excess of the Frobenius error over the best error of that rank.
        generator: Source of the start block, on a's device.
    """
    smaller = min(a.shape)
    block = max(rank + OVERSAMPLING, _SMALLEST_BLOCK)
    if 2 * block > smaller:
        return _direct(a, rank, a.dtype)
    eps = torch.finfo(a.dtype).eps
    start = torch.randn(a.shape[1], block, generator=generator, dtype=a.dtype, device=a.device)
    seen, _ = orthonormalize(a @ start)
    image, projected = a.new_empty(a.shape[1], 0), a.new_empty(0, block, dtype=torch.float64)
    operator, adjoint = a.mT, True  # maps `seen` to `image`; alternates between aᵀ and a
    captured: list[float] = []
    while image.shape[1] + block <= smaller:
        coupling, fresh, growth = extend(image, operator @ seen[:, -block:])
        projected = _bordered(projected, coupling, growth)
        image = torch.cat([image, fresh], dim=1)
        captured.append(_leading_energy(projected, rank))
        invariant = float(growth.square().sum()) <= (10 * eps) ** 2 * energy  # the space holds all of a
        if invariant or _converged(captured, energy, tol, eps):
            left, s, right = _direct(projected, rank, a.dtype)
            images, sources = image @ left, seen @ right.mT
            return (sources, s, images.mT) if adjoint else (images, s, sources.mT)
        seen, image, projected = image, seen, projected.mT
        operator, adjoint = operator.mT, not adjoint
    return _direct(a, rank, a.dtype)


def _bordered(projected: Tensor, coupling: Tensor, growth: Tensor) -> Tensor:
    """Replaces the last columns by the products just made: operator @ seen = [image fresh] @ result."""
    kept = projected[:, : projected.shape[1] - coupling.shape[1]]
    top = torch.cat([kept, coupling], dim=1)
    bottom = torch.cat([kept.new_zeros(growth.shape[0], kept.shape[1]), growth], dim=1)
    return torch.cat([top, bottom])


def _leading_energy(projected: Tensor, rank: int) -> float:
    """Sum of the ``rank`` largest squared singular values."""
    small = projected if projected.shape[0] <= projected.shape[1] else projected.mT
    return float(torch.linalg.eigvalsh(small @ small.mT)[-rank:].sum())


def _direct(a: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """Leading triplets by a direct driver: for float32 vectors the Gram is exact enough, and faster."""
    u, s, vh = exact(a) if dtype == torch.float64 else gram(a, rank)
    return u[..., :rank].to(dtype), s[..., :rank].to(dtype), vh[..., :rank, :].to(dtype)


def _converged(captured: list[float], energy: float, tol: float, eps: float) -> bool:
    """Whether the energy still to be gained is within ``tol`` of the squared error.

    Gains alternate between the two sides, so they are compared over pairs of products: with d_j = E_j - E_(j-2) and
    r = (d_j / d_(j-1))^2 what is left is about d_j r / (1 - r). The squared error may exceed the best by about 2 tol;
    half of that is the margin for the extrapolation, an eighth where only three values are known.
    """
    noise = 4 * eps * energy
    missed = energy - captured[-1]
    if len(captured) < 3:
        return False
    gain = captured[-1] - captured[-3]
    if min(missed, gain) <= noise:
        return len(captured) + 1 >= _HIDDEN
    if len(captured) == 3:
        last, before = captured[-1] - captured[-2], captured[-2] - captured[-3]
        return 0 <= last < before and last * last / (before - last) <= tol / 4 * missed
    ratio = (gain / max(captured[-2] - captured[-4], noise)) ** 2
    return ratio < 1 and gain * ratio / (1 - ratio) <= tol * missed
