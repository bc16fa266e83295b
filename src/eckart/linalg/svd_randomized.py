"""Randomized block Krylov driver of the SVD, one Rayleigh-Ritz step per product with a. A pure function.

    U = orth(a Ω),   Z = aᵀ U,   Zᵀ Z = Y Λ Yᵀ,   X = Z Y Λ^(-1/2),   V = [V  orth((I - V Vᵀ) X_lead)]

and the same with a for aᵀ and U and V exchanged, in turn. U Y approximates left singular vectors, X the right ones
that belong to them, and the leading entries of Λ are the energy (sum of squares) they capture. Both bases only grow,
which after the same number of products is far more accurate than subspace iteration, which forgets. Unlike the block
Krylov method of Musco and Musco it keeps the products, so the best approximation in the space and its error are known
after every one of them, and only the leading directions go on, which makes the products narrower.

Reference: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
arXiv:0909.4061; Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular
value decomposition", NeurIPS 2015, arXiv:1504.05477.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ._basis import extend, orthonormalize
from .svd_direct import Factors, exact, gram

__all__ = ["OVERSAMPLING", "randomized"]

OVERSAMPLING = 8  # least number of columns beyond the wanted rank in the first block
_TILE = 16  # a product with a number of columns between two multiples of it takes as long as with the larger
_EVEN = 0.5  # ratio of the pivots of a Ω from which the spectrum looks flat and oversampling is not worth its time
_GAP = 1e-2  # ratio of the last eigenvalue in the first block to the last wanted one below which oversampling is done
_HIDDEN = 7  # products to make where the tail drowns in rounding: enough for every spectrum tried, 4 are not
_VISIBLE = 30  # roundings of the energy that ``tol`` of the tail must amount to for small matrices in float32
_FLAT_MARGIN = 2.0  # on the variance of the spectrum, sampled by a block: standard deviation below a half of it
_PROBES = ((1, 6.0), (_TILE, 1.25))  # number of random vectors, and the margin on an estimate from so few


def randomized(a: Tensor, rank: int, energy: float, *, tol: float, generator: torch.Generator) -> Factors:
    """The ``rank`` leading triplets of a (m, n), with a Frobenius error within ``tol`` of the best.

    Every product with a tells how much energy the top ``rank`` directions have captured. The iteration stops when
    what the next product would add, estimated from a few random vectors at a fraction of its cost, and what would
    come after it change the error by less than ``tol``: after 2 products for flat spectra, 3 for a gap, 5 for 1 / i,
    7 for the slowest. Complexity O(m n rank) a product. Where the bases would outgrow min(m, n) a direct driver is
    cheaper and takes over.

    Args:
        a: (m, n) float32 or float64, well scaled.
        rank: 1 <= rank <= min(m, n).
        energy: Squared Frobenius norm of a.
        tol: Allowed relative excess of the Frobenius error over the best error of that rank.
        generator: Source of the start block and of the probes, on a's device.
    """
    smaller, eps = min(a.shape), torch.finfo(a.dtype).eps
    block = -(-(rank + max(OVERSAMPLING, rank // 8)) // _TILE) * _TILE
    if 2 * block > smaller:
        return _direct(a, rank)
    start = torch.randn(a.shape[1], block, generator=generator, dtype=a.dtype, device=a.device)
    fresh, r = orthonormalize(a @ start)
    pivots = r.diagonal().square()
    if float(pivots.min()) > _EVEN * float(pivots.max()):
        fresh = fresh[:, : max(rank, _TILE)]
    side, other = _Side(a.mT), _Side(a)
    captured: list[float] = []
    lead, decay, dtype = block, 1.0, a.dtype
    while side.basis.shape[1] + block <= smaller:
        side.append(fresh)
        side.rayleigh_ritz(dtype)
        if dtype != torch.float64 and tol * (energy - side.energy(rank)) < _VISIBLE * eps * energy:
            dtype = torch.float64  # from now on: the tail only gets smaller
            side.rayleigh_ritz(dtype)
        captured.append(side.energy(rank))
        if len(captured) == 1:
            decay = float(side.values[-1].clamp(min=0) / side.values[rank - 1].clamp(min=1e-300))
            lead = max(rank, _TILE) if decay < _GAP else block
        converged = _converged(side, captured, decay, rank, energy, tol, generator)
        if not converged:
            lengths = side.values[:lead].clamp(min=0).sqrt()
            images = side.product.to(dtype) @ (side.vectors[:, :lead] * _reciprocal(lengths, eps).to(dtype))
            _, fresh, growth = extend(other.basis, images.to(a.dtype))
            # Where the images add nothing to the other basis, both are invariant under a.
            converged = float((growth * lengths).square().sum()) <= (10 * eps) ** 2 * energy
        if converged:
            left, s, right = side.triplets(rank)
            return (left, s, right.mT) if side.operator is a else (right, s, left.mT)
        side, other = other, side
    return _direct(a, rank)


class _Side:
    """An orthonormal basis on one side of a, its product with ``operator``, a or aᵀ, and what follows from it."""

    values: Tensor  # eigenvalues of the Gram matrix of the product, descending, float64
    vectors: Tensor  # their eigenvectors

    def __init__(self, operator: Tensor) -> None:
        self.operator = operator
        self.basis, self.product = (operator.new_empty(size, 0) for size in reversed(operator.shape))

    def append(self, fresh: Tensor) -> None:
        """Adds columns to the basis and makes their product."""
        new, first = self.operator @ fresh, self.basis.shape[1] == 0
        self.basis = fresh if first else torch.cat([self.basis, fresh], dim=1)
        self.product = new if first else torch.cat([self.product, new], dim=1)

    def rayleigh_ritz(self, dtype: torch.dtype) -> None:
        """Finds the directions in the basis whose products are orthogonal, largest first."""
        if self.product.dtype == torch.float64:  # the Gram matrix would lose half of the digits
            _, s, vh = exact(torch.linalg.qr(self.product, mode="r").R)
            self.values, self.vectors = s.square(), vh.mT
        else:
            product = self.product.to(dtype)
            values, vectors = torch.linalg.eigh(product.mT @ product)
            self.values, self.vectors = values.to(torch.float64).flip(0), vectors.flip(1)

    def energy(self, rank: int) -> float:
        """Energy of a that the leading directions capture."""
        return float(self.values[:rank].sum())

    def triplets(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """u, s, v of the best approximation operator ≈ u diag(s) vᵀ with v in the basis."""
        dtype = self.basis.dtype
        y = self.vectors[:, :rank]
        u, r = orthonormalize(self.product.to(y.dtype) @ y, dtype)
        s = r.diagonal()
        v = self.basis @ (y * torch.where(s < 0, -1, 1)).to(dtype)  # Householder QR makes some negative
        s, order = s.abs().sort(descending=True, stable=True)
        if bool((order.diff() != 1).any()):  # rarely: values that differ by rounding
            u, v = u[:, order], v[:, order]
        return u, s.to(dtype), v

    def unseen(self, rank: int, mixing: Tensor) -> float:
        """||R mixing||^2 for the part R of operatorᵀ X that is not in the basis, X the ``rank`` leading images.

        operatorᵀ X = basis Y Λ^(1/2) + R, so ||R||^2 is the energy that a product with X would add to what is captured.
        """
        lengths, dtype = self.values[:rank].clamp(min=0).sqrt(), self.basis.dtype
        y = self.vectors[:, :rank].to(torch.float64)
        x = self.product @ (y * _reciprocal(lengths, torch.finfo(dtype).eps) @ mixing).to(dtype)
        residual = self.operator.mT @ x - self.basis @ (y * lengths @ mixing).to(dtype)
        return float(torch.linalg.vector_norm(residual)) ** 2


def _reciprocal(lengths: Tensor, eps: float) -> Tensor:
    """1 / lengths, 0 where they are rounding."""
    return torch.where(lengths > eps * lengths[0], 1 / lengths, 0)


def _direct(a: Tensor, rank: int) -> Factors:
    """Leading triplets by a direct driver: for float32 the Gram is exact enough, and faster."""
    u, s, vh = exact(a) if a.dtype == torch.float64 else gram(a, rank)
    return u[:, :rank], s[:rank], vh[:rank]


def _converged(
    side: _Side,
    captured: list[float],
    decay: float,
    rank: int,
    energy: float,
    tol: float,
    generator: torch.Generator,
) -> bool:
    """Whether the energy still to be gained is within 2 tol of the missed energy, the error within tol of the best."""
    noise = 4 * torch.finfo(side.basis.dtype).eps * energy
    missed = energy - captured[-1]
    if missed <= noise:
        return len(captured) + 1 >= _HIDDEN
    allowed = 2 * tol * missed
    if len(captured) == 1:
        return _most(side, rank, energy) - captured[0] <= allowed
    gains = [later - earlier for earlier, later in pairwise(captured)]
    # Gains alternate between the two sides of a, so the slower of the last two ratios counts.
    ratios = [min(later / max(earlier, noise), 1.0) for earlier, later in pairwise(gains)][-2:] or [decay**0.5]
    # All later gains together came to at most this multiple of ||R||^2 for every spectrum tried.
    factor = 1.5 + 3 * max(ratios)
    expected = gains[-1] * min(decay, ratios[-1])
    for columns, margin in _PROBES:
        if margin * factor * expected <= allowed:
            mixing = torch.eye(rank, dtype=torch.float64, device=side.basis.device)
            if columns < rank:  # ||R||^2 is the mean of ||R g||^2 over random signs g
                shape = (rank, columns) if columns > 1 else (rank,)  # a product with a vector proper is faster
                signs = 2 * torch.randint(0, 2, shape, generator=generator, device=mixing.device) - 1
                mixing = signs.to(torch.float64) / columns**0.5
            return margin * factor * side.unseen(rank, mixing) <= allowed
    return False


def _most(side: _Side, rank: int, energy: float) -> float:
    """Upper bound of the energy of ``rank`` directions, sharp for flat spectra, from a random basis.

    By Cauchy-Schwarz the k largest of p eigenvalues with mean μ and sum of squared deviations S come to at most
    k μ + sqrt(k S). A basis of b random directions sees the share (b / p)^2 of S.
    """
    smaller = min(side.operator.shape)
    mean = energy / smaller
    deviations = (smaller / len(side.values)) ** 2 * float((side.values - mean).square().sum())
    return rank * mean + (rank * _FLAT_MARGIN * deviations) ** 0.5
