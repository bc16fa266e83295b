"""Nyström approximation of a positive semidefinite matrix from a few of its columns, or from a sketch.

    G ~ C W⁺ Cᵀ = F Fᵀ,   C = G Ω (n, k),   W = Ωᵀ G Ω (k, k),   F (n, k)

with Ω k columns of the identity (the chosen columns of G) or Gaussian. ``G - F Fᵀ`` is positive semidefinite again, so
its nuclear norm is the difference of the traces. For a matrix that is not symmetric there is ``skeleton``.

Reference: Y. Chen, E. N. Epperly, J. A. Tropp and R. J. Webber, "Randomly pivoted Cholesky: practical approximation
of a kernel matrix with few entry evaluations", Comm. Pure Appl. Math. 78 (2025), arXiv:2207.06503; J. A. Tropp, A.
Yurtsever, M. Udell and V. Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data",
NeurIPS 2017, arXiv:1706.05736. Different here: whatever rule chooses the columns, F is built by a partial Cholesky
factorisation that takes the largest pivot among them first, so that a singular W is never inverted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ._basis import orthonormalize
from ._prepare import prepare, rescale, result_dtype, squared_norm
from .eigh import Eigh, symmetric_part
from .errors import LinalgError
from .leverage import ridge_leverage_scores
from .svd import svd
from .whiten import NEGATIVE

__all__ = ["Nystrom", "NystromSelection", "nystrom"]

NystromSelection = Literal["random-pivot", "pivot", "leverage", "uniform", "gaussian"]
_ROWS = 256  # of the residual at a time


@dataclass(frozen=True)
class Nystrom:
    """Low-rank factor of a positive semidefinite matrix.

    Attributes:
        factor: F (n, k) with G ~ F Fᵀ.
        indices: (k,) int64, the chosen columns in the order of their pivots; None for "gaussian".
        error: float64 scalar, Frobenius norm of ``G - F Fᵀ``.
        trace_error: float64 scalar, its trace, which is its nuclear norm.
    """

    factor: Tensor
    indices: Tensor | None
    error: Tensor
    trace_error: Tensor

    @property
    def rank(self) -> int:
        """Number k of columns of the factor."""
        return self.factor.shape[1]

    def reconstruct(self) -> Tensor:
        """F Fᵀ, (n, n)."""
        return self.factor @ self.factor.mT

    def eigh(self) -> Eigh:
        """Nonzero eigenpairs of F Fᵀ by the SVD of F, O(n k^2): values (k,) descending, vectors (n, k)."""
        u, s, _, _ = svd(self.factor, driver="exact")
        return Eigh(s.square(), u)


def nystrom(
    gram: Tensor,
    rank: int,
    *,
    select: NystromSelection = "random-pivot",
    ridge: float | None = None,
    generator: torch.Generator | None = None,
) -> Nystrom:
    """Nyström approximation of a positive semidefinite matrix.

        G ~ F Fᵀ,   G (n, n),   F (n, k),   G - F Fᵀ positive semidefinite

    "random-pivot" is the rule to begin with: its expected trace error is at most 1 + ε times the best one of rank r
    after r / ε + r log(1 / (ε δ)) columns, δ being the best relative error. At equal k the sketch "gaussian" is about
    as accurate, but reads all of G and keeps none of its columns. Columns cost O(n k^2), the sketch and the Frobenius
    error O(n^2 k), leverage scores O(n^3). Computed in float64. Not differentiable. Not batched.

    Args:
        gram: (n, n) symmetric positive semidefinite, any float dtype.
        rank: Number k of columns, fewer where gram has a lower numerical rank.
        select: "random-pivot": each column drawn with probability in proportion to the diagonal of what is left.
            "pivot": the largest diagonal entry of what is left; deterministic, but prefers outliers. "leverage":
            drawn with ridge leverage scores as probabilities. "uniform": all alike. "gaussian": no columns, a sketch.
        ridge: For "leverage", in units of the mean diagonal. Default n / rank, the smallest that is sure to give
            scores that sum to at most ``rank``.
        generator: Source of the draw, on gram's device; None for a private one with a fixed seed.

    Returns:
        Factor, indices and errors.

    Raises:
        LinalgError: Not square, symmetric and positive semidefinite, NaN or Inf.
        ValueError: Unknown select, rank below 1, ridge negative or without "leverage".

    Example:
        >>> import torch
        >>> result = nystrom(torch.diag(torch.tensor([4.0, 1.0, 9.0])), 2, select="pivot")
        >>> result.indices.tolist(), result.factor.tolist(), float(result.trace_error)
        ([2, 0], [[0.0, 2.0], [0.0, 0.0], [3.0, 0.0]], 1.0)

    Reference:
        Chen, Epperly, Tropp and Webber, arXiv:2207.06503; Tropp et al., arXiv:1706.05736, for "gaussian".
    """
    if select not in get_args(NystromSelection):
        raise ValueError(f"select must be one of {', '.join(get_args(NystromSelection))}, not {select!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if ridge is not None and select != "leverage":
        raise ValueError(f'ridge belongs to select="leverage", not to {select!r}; leave it out')
    if gram.ndim > 2:
        raise LinalgError.about("gram", gram, "is a batch", "call this for each matrix: the rank depends on the values")
    work, scale, energy = prepare(gram, "gram", dtype=torch.float64, square=True)
    if work.numel() == 0:
        raise LinalgError.about("gram", gram, "is empty", "give at least one variable")
    work, rank = symmetric_part(work, "gram"), min(rank, gram.shape[0])
    diagonal = work.diagonal()
    if bool(energy.sqrt() > (1 + NEGATIVE) * diagonal.sum()):  # a norm above the trace
        raise _indefinite(gram)
    eps = torch.finfo(result_dtype(gram)).eps
    if generator is None:
        generator = torch.Generator(device=gram.device).manual_seed(0)
    allowed, indices = None, None
    if select == "gaussian":
        factor = _sketched(work, rank, eps, generator)
    else:
        if select == "uniform":
            allowed = torch.randperm(work.shape[0], generator=generator, device=work.device)[:rank]
        elif select == "leverage":
            scores = ridge_leverage_scores(work, work.shape[0] / rank if ridge is None else ridge)
            # So that there are enough to draw; the factorisation passes over columns of zeros.
            allowed = torch.multinomial(scores + torch.finfo(scores.dtype).eps, rank, generator=generator)
        factor, indices = _pivoted(work, rank, eps, allowed, generator if select == "random-pivot" else None)
    left = diagonal - torch.linalg.vecdot(factor, factor)
    if bool(left.amin() < -NEGATIVE * diagonal.amax()):
        raise _indefinite(gram)
    parts = zip(work.split(_ROWS), factor.split(_ROWS), strict=True)
    error = torch.stack([squared_norm(x - y @ factor.mT) for x, y in parts]).sum().sqrt()
    factor = rescale(factor, scale.sqrt(), "factor", result_dtype(gram))
    return Nystrom(factor, indices, error * scale, left.sum().clamp(min=0) * scale)


def _pivoted(
    gram: Tensor, count: int, eps: float, allowed: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Partial Cholesky factor (n, k) and its pivots: drawn if there is a generator, else the largest allowed."""
    n, diagonal = gram.shape[0], gram.diagonal().clamp(min=0)
    # Below this there is only rounding, that of the input or that of the elimination.
    floor = max(n * torch.finfo(gram.dtype).eps, 16 * eps) * diagonal.amax()
    mask = torch.ones(n, dtype=torch.bool, device=gram.device)
    if allowed is not None:
        mask = torch.zeros_like(mask).index_fill_(0, allowed, True)
    factor, pivots = gram.new_zeros(n, count), []
    for step in range(count):
        left = torch.where(mask & (diagonal > floor), diagonal, 0)
        if not bool(left.any()):
            break
        pivot = int(left.argmax() if generator is None else torch.multinomial(left, 1, generator=generator))
        column = gram[:, pivot] - factor[:, :step] @ factor[pivot, :step]
        factor[:, step] = column / column[pivot].clamp(min=floor / 2).sqrt()
        diagonal = (diagonal - factor[:, step].square()).clamp(min=0)
        mask[pivot] = False
        pivots.append(pivot)
    indices = torch.tensor(pivots, dtype=torch.int64, device=gram.device)
    return factor[:, : len(pivots)], indices


def _sketched(gram: Tensor, count: int, eps: float, generator: torch.Generator) -> Tensor:
    """Factor (n, k) from a Gaussian sketch: of gram + shift I, which is safely positive, with the shift taken off."""
    n = gram.shape[0]
    test, _ = orthonormalize(torch.randn(n, count, generator=generator, dtype=gram.dtype, device=gram.device))
    image = gram @ test
    size = torch.linalg.matrix_norm(image).clamp(min=torch.finfo(gram.dtype).tiny)
    for shift in (size * eps * n**0.5, size * NEGATIVE):  # the second for a Gram matrix that was summed in float32
        shifted = image + shift * test
        core = test.mT @ shifted
        lower, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
        if int(info) == 0:
            half = torch.linalg.solve_triangular(lower, shifted.mT, upper=False).mT
            u, s, _, _ = svd(half, driver="exact")
            values = s.square() - shift
            return (u * values.clamp(min=0).sqrt())[:, values > shift]  # a smaller one is rounding
    raise _indefinite(gram)


def _indefinite(gram: Tensor) -> LinalgError:
    return LinalgError.about("gram", gram, "is not positive semidefinite", "give a Gram matrix such as x.T @ x")
