"""Low-rank fit to the entries of a matrix that were observed, or to entries of different weight.

    min over rank(B) <= k of  1/2 sum_ij W_ij (A_ij - B_ij)^2 + λ ||B||_*        A, B, W (m, n), W_ij >= 0

With W scaled to [0, 1] the current fit fills in what was not observed, and the filled matrix X is approximated by its
SVD, the singular values lowered by λ (Srebro and Jaakkola; soft-impute of Mazumder, Hastie and Tibshirani):

    X = W ∘ A + (1 - W) ∘ B,    B <- S_λ(X)_k

Each step lowers the objective. Different here: a full SVD in every step is not needed, because one product with the
last right vectors V gives a basis Q of range(X V) in which the step still lowers it; B is extrapolated along its last
change (Nesterov), and where that would raise the objective a plain step is taken instead.

Reference: N. Srebro and T. Jaakkola, "Weighted low-rank approximations", ICML 2003; R. Mazumder, T. Hastie and
R. Tibshirani, "Spectral regularization algorithms for learning large incomplete matrices", JMLR 11 (2010); T. Hastie,
R. Mazumder, J. Lee and R. Zadeh, "Matrix completion and low-rank SVD via fast alternating least squares", JMLR 16
(2015), arXiv:1410.2596, for the step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._basis import column_signs, orthonormalize
from ._prepare import all_finite, prepare, rescale, squared_norm
from .errors import LinalgError
from .svd import SVD, svd

__all__ = ["MaskedSVD", "masked_svd"]

_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_TOL = {torch.float32: 1e-5, torch.float64: 1e-8}


class MaskedSVD(NamedTuple):
    """Singular triplets of a low-rank fit B = u diag(s) vh.

    Attributes:
        u: (..., m, k) orthonormal columns; the entry of largest magnitude in each is positive.
        s: (..., k) singular values, descending; zeros where ``penalty`` or the data leave a lower rank.
        vh: (..., k, n) orthonormal rows.
        error: (...,) float64, ``sqrt(sum W (A - B)^2)`` over the observed entries.
        iterations: (...,) int64, steps taken.
        converged: (...,) bool, whether the last step moved B by less than ``tol``.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    error: Tensor
    iterations: Tensor
    converged: Tensor

    def reconstruct(self) -> Tensor:
        """B = u diag(s) vh, (..., m, n)."""
        return (self.u * self.s[..., None, :]) @ self.vh


def masked_svd(
    a: Tensor,
    mask: Tensor,
    rank: int,
    *,
    penalty: float = 0.0,
    start: SVD | MaskedSVD | None = None,
    tol: float | None = None,
    max_iterations: int = 1000,
) -> MaskedSVD:
    """Best low-rank fit to the observed entries of a matrix, or under a weight for every entry.

        min over rank(B) <= k of  1/2 sum W (A - B)^2 + λ ||B||_*,    λ = penalty * s_1(W ∘ A)

    With all weights equal and no penalty it is the truncated SVD. Otherwise the problem is NP-hard without a penalty;
    the iteration starts from the zero-filled matrix and ends in a local minimum, which recovers a matrix of rank k
    from a few times k (m + n) well-spread entries. With a penalty large enough that fewer than k singular values
    remain, the problem is convex and the minimum global. Each step costs O(m n k). The steps needed grow with the
    share of missing entries (tens at a half, hundreds at nine tenths) and like the root of max(W) / typical W, so clip
    weights of many decades. Rows and columns without any weight are zero in B (smallest norm). Not differentiable.

    Args:
        a: (..., m, n), any float dtype. Entries of weight zero do not matter and may be NaN.
        mask: (..., m, n), or (m, n) for a whole batch: true where observed, or weights in [0, inf). Their scale does
            not matter to B.
        rank: Largest rank k of B.
        penalty: λ in units of s_1(W ∘ A); from 1 on B is zero. Lowers the variance where observations are few and
            noisy. A sequence of falling penalties, each started from the last result, is the regularisation path.
        start: An earlier result for this shape and rank to start from.
        tol: Relative change of B in one step at which to stop, default 1e-5 in float32 and 1e-8 in float64. The
            distance to the limit is larger by the reciprocal of the convergence rate.
        max_iterations: Steps after which to give up, with ``converged`` false.

    Returns:
        The fit, its error on the observed entries, and whether it converged.

    Raises:
        LinalgError: NaN or Inf where observed, weights negative, NaN or infinite, shapes that do not fit, or empty.
        ValueError: rank or max_iterations below 1, penalty negative, tol not positive.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, 2.0], [2.0, float("nan")]])  # of rank one: 4 is missing
        >>> result = masked_svd(a, ~a.isnan(), rank=1, tol=1e-7)
        >>> [round(x, 3) for x in result.reconstruct()[1].tolist()], bool(result.converged)
        ([2.0, 4.0], True)
    """
    _check_options(rank, penalty, tol, max_iterations)
    weight, largest = _weights(a, mask)
    work, scale, _ = prepare(torch.where(weight > 0, a, 0))
    weight = weight.to(work.dtype)
    k = min(rank, *a.shape[-2:])
    initial = None if start is None else _initial(start, work, k, scale)
    tol = _TOL[work.dtype] if tol is None else tol
    batch = a.shape[:-2]
    flat = (part.reshape(-1, *part.shape[len(batch) :]) for part in (work, weight, *(initial or ())))
    results = [_fit(*parts, k=k, penalty=penalty, tol=tol, limit=max_iterations) for parts in zip(*flat, strict=True)]
    u, s, vh, error, iterations, converged = (
        torch.stack(part).reshape((*batch, *part[0].shape)) for part in zip(*results, strict=True)
    )
    signs = column_signs(u)
    s, error = rescale(s, scale, "singular values"), error * largest.sqrt() * scale
    return MaskedSVD(u * signs, s, vh * signs.mT, error, iterations, converged)


def _fit(a: Tensor, weight: Tensor, *start: Tensor, k: int, penalty: float, tol: float, limit: int) -> _Parts:
    """One matrix with weights in [0, 1]; ``start`` is nothing, or u (m, k), s (k,) and vh (k, n)."""
    observed, root = weight * a, weight.sqrt()
    # Rows and columns without any weight are filled with zeros, so that they stay zero to the last digit.
    seen = (weight.amax(dim=1, keepdim=True) > 0) & (weight.amax(dim=0) > 0)
    hidden = torch.where(seen, 1 - weight, 0)
    shrink = penalty * float(svd(observed, 1, driver="lanczos").s) if penalty else 0.0

    def error(fit: Tensor) -> Tensor:
        return squared_norm(root * (a - fit))

    def step(fit: Tensor, vh: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], float]:
        filled = torch.addcmul(observed, hidden, fit)
        basis, _ = orthonormalize(filled @ vh.mT)
        left, s, vh, _ = svd(basis.mT @ filled, driver="exact")
        u, s = basis @ left, (s - shrink).clamp(min=0)
        fit = (u * s) @ vh
        return fit, (u, s, vh), float(error(fit)) / 2 + shrink * float(s.sum())

    if start:
        u, s, vh = start
    else:
        uniform = bool((weight == weight[0, 0]).all())
        u, s, vh, _ = svd(observed, k, driver="exact" if uniform else "auto")
        s = (s - shrink).clamp(min=0)
    fit = last = (u * s) @ vh
    value, momentum, converged, iteration = float(error(fit)) / 2 + shrink * float(s.sum()), 1.0, False, 0
    while not converged and iteration < limit:
        iteration += 1
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        new, triplets, new_value = step(fit + (momentum - 1) / following * (fit - last), vh)
        if new_value > value and momentum > 1:
            following = 1.0
            new, triplets, new_value = step(fit, vh)
        if new_value > value:  # a plain step cannot raise it but by rounding: there is nothing more to gain
            converged = True
            break
        converged = bool(squared_norm(new - fit) <= tol**2 * triplets[1].square().sum())
        last, fit, value, momentum, (u, s, vh) = fit, new, new_value, following, triplets
    count, done = torch.tensor(iteration, device=a.device), torch.tensor(converged, device=a.device)
    return u, s, vh, error(fit).sqrt(), count, done


def _weights(a: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a's shape scaled to [0, 1], and what each matrix's were divided by, both float64."""
    if a.ndim < 2 or a.numel() == 0:
        raise LinalgError.about("a", a, "is not a matrix with entries", "give it two dimensions, rows and columns")
    if mask.shape not in (a.shape, a.shape[-2:]):
        raise LinalgError.about("mask", mask, f"does not fit a of shape {tuple(a.shape)}", "give one weight an entry")
    weight = mask.detach().to(device=a.device, dtype=torch.float64)
    if not all_finite(weight) or bool((weight < 0).any()):
        raise LinalgError.about("mask", mask, "has weights that are negative, NaN or Inf", "clip it to [0, inf)")
    weight = weight.expand(a.shape)
    largest = weight.amax(dim=(-2, -1))
    return weight / torch.where(largest > 0, largest, 1)[..., None, None], largest


def _initial(start: SVD | MaskedSVD, a: Tensor, k: int, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets of an earlier result in the scale and dtype of a."""
    u, s, vh = (part.detach().to(a.dtype) for part in (start.u, start.s / scale[..., None], start.vh))
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    if (u.shape, s.shape, vh.shape) != ((*batch, m, k), (*batch, k), (*batch, k, n)):
        raise LinalgError.about("start", u, f"is no result of rank {k} for a of shape {tuple(a.shape)}", "leave it out")
    if not (all_finite(u) and all_finite(s) and all_finite(vh)):
        raise LinalgError.about("start", u, "contains NaN or Inf", "leave it out")
    return u, s, vh


def _check_options(rank: int, penalty: float, tol: float | None, max_iterations: int) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}")
    if not 0 <= penalty < float("inf"):
        raise ValueError(f"penalty must be a finite number of at least 0, not {penalty}")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
