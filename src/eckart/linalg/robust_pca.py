"""Splits a matrix into one of low rank and a sparse one, so that a few gross entries do not spoil the singular vectors.

    A = L + S + remainder,   A (m, n), L of low rank, S with few nonzeros

"pcp"      min ||L||_* + λ ||S||_1  subject to  L + S = A       convex; finds the rank and the nonzeros itself
"altproj"  a threshold on both parts that falls, rank k given   fastest where such a split exists
"godec"    min ||A - L - S||_F,  rank k and the pattern of S given, for storage under a budget

Reference: E. Candès, X. Li, Y. Ma and J. Wright, "Robust principal component analysis?", J. ACM 58 (2011),
arXiv:0912.3599; Z. Lin, M. Chen and Y. Ma, "The augmented Lagrange multiplier method", arXiv:1009.5055;
P. Netrapalli et al., "Non-convex robust PCA", NeurIPS (2014), arXiv:1410.7660; H. Cai, J.-F. Cai and K. Wei,
"Accelerated alternating projections for robust PCA", JMLR 20 (2019), arXiv:1711.05519, for the threshold; T. Zhou and
D. Tao, "GoDec", ICML (2011). What differs: the inexact method of Lin et al. multiplies its penalty at every step and
stops, after some 25 steps, at a feasible point; in noise that is not the optimum. Here the penalty balances the two
residuals, and both must vanish. Alternating projections raise the rank as the threshold falls, not in stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ._alternating_projections import Split, altproj, godec
from ._basis import column_signs
from ._prepare import prepare, rescale, squared_norm
from .errors import LinalgError
from .norms import spectral_norm
from .semi_structured import keep_n_of_m
from .soft_threshold import hard_threshold, singular_value_threshold, soft_threshold
from .svd import SVD, svd

__all__ = ["RobustPCA", "SplitMethod", "robust_pca"]

SplitMethod = Literal["pcp", "altproj", "godec"]
Sparsity = int | float | tuple[int, int]

_BALANCE_EVERY, _BALANCE_UNTIL = 5, 500  # steps; convergence is proven for a penalty that no longer changes
_REMAINDER_COUNTS = (
    2.0  # times the change of S: fewest steps over exact splits, noise and weights, where 1 and 3 differ
)
_TOL = {torch.float32: 1e-5, torch.float64: 1e-7}
_GODEC_TOL = 1e-5


@dataclass(frozen=True)
class RobustPCA:
    """A matrix, or a batch of them, as low rank plus sparse.

    Attributes:
        low_rank: L (..., m, n) as singular triplets; its ``error`` is the one below.
        sparse: S (..., m, n) with its zeros; ``sparse.to_sparse()`` or ``sparse.to_sparse_csr()`` packs it.
        dual: (..., m, n) Lagrange multiplier Y of L + S = A for "pcp", else None. It proves the optimum: with
            ||Y||_2 <= 1 and |Y_ij| <= λ no split costs less than the inner product of Y and A.
        error: (...,) float64, Frobenius norm of A - L - S where A was observed.
        iterations: (...,) int64, steps taken.
        converged: (...,) bool, whether the tolerance was met before ``max_iterations``.
    """

    low_rank: SVD
    sparse: Tensor
    dual: Tensor | None
    error: Tensor
    iterations: Tensor
    converged: Tensor

    @property
    def mask(self) -> Tensor:
        """Where S is not zero, (..., m, n) bool."""
        return self.sparse != 0

    def reconstruct(self) -> Tensor:
        """L + S, (..., m, n)."""
        return self.low_rank.reconstruct() + self.sparse


def robust_pca(
    a: Tensor,
    *,
    method: SplitMethod = "pcp",
    rank: int | None = None,
    sparsity: Sparsity | None = None,
    per_row: bool = False,
    sparse_weight: float | None = None,
    observed: Tensor | None = None,
    tol: float | None = None,
    max_iterations: int = 1000,
) -> RobustPCA:
    """Splits a matrix into low rank plus sparse.

        a (m, n) = L + S + remainder

    "pcp" recovers both parts exactly, with high probability, if the singular vectors of L are spread out, the nonzeros
    of S are at random places and both rank and number of nonzeros are small. It needs no other knowledge, and as its
    problem is convex, it ends at the optimum. A step costs one SVD, but only of the singular values above the
    threshold, O(m n rank); 20 to 300 steps where such a split exists, a few hundred in noise (where the rank found is
    large). "altproj" costs two products with k columns a step, O(m n k), and takes 10 to 150 steps; it expects an
    exact split, and in noise puts the noise into S unless ``sparsity`` limits it. "godec" lowers the error at every
    step by minimising it exactly over S and over either factor of L in turn, O(m n k) a step, to a local optimum: the
    problem is not convex. None is differentiable. The matrices of a batch are split one by one.

    Args:
        a: (..., m, n), any float dtype.
        method: "pcp", "altproj" or "godec".
        rank: Rank k of L, at most min(m, n), for "altproj" and "godec"; "pcp" finds it.
        sparsity: Nonzeros of S, for "godec" and, as an upper limit, for "altproj": a number (int), a fraction of the
            entries (float, so 1 is one entry and 1.0 all), or (N, M) for N of every M neighbours in a row.
        per_row: Whether a number or fraction holds for each row instead of the whole matrix.
        sparse_weight: λ of "pcp", default 1 / sqrt(max(m, n) p) with p the observed fraction (Candès et al.).
        observed: (..., m, n) bool, where a is known, for "pcp": the rest of a may hold anything, L fills it in and S is
            zero there. None for everywhere.
        tol: For "pcp", both the norm of the remainder relative to a and the change of S in the multiplier relative to
            it; for "altproj", the former; default 1e-5 in float32 and 1e-7 in float64. For "godec", the relative
            decrease of the error below which it stops, default 1e-5.
        max_iterations: Steps at most.

    Returns:
        Both parts, the error, and whether the iteration converged; in float64 for float64 input and float32 otherwise.

    Raises:
        LinalgError: Not a float matrix, empty, NaN or Inf (where observed), observed or the pattern does not fit.
        ValueError: Options that are out of range, missing, or of another method.

    Example:
        >>> import torch
        >>> a = torch.outer(torch.arange(1.0, 9.0), torch.ones(8))
        >>> a[2, 5] += 50
        >>> result = robust_pca(a)
        >>> result.low_rank.rank, result.mask.nonzero().tolist(), round(float(result.sparse[2, 5]), 2)
        (1, [[2, 5]], 50.0)
        >>> robust_pca(a, method="godec", rank=1, sparsity=1).mask.nonzero().tolist()
        [[2, 5]]
    """
    _check_options(method, rank, sparsity, sparse_weight, observed, tol, max_iterations)
    if observed is not None:
        if observed.shape != a.shape or observed.dtype != torch.bool:
            raise LinalgError.about("observed", observed, "does not fit a", f"give a bool tensor of {tuple(a.shape)}")
        a = torch.where(observed, a, 0)
    work, scale, energy = prepare(a)
    if work.numel() == 0:
        raise LinalgError.about("a", a, "is empty", "give it rows and columns")
    if isinstance(sparsity, tuple) and a.shape[-1] % sparsity[1]:
        raise LinalgError.about("a", a, f"has rows that {sparsity[1]} does not divide", "choose another pattern")
    if tol is None:
        tol = _GODEC_TOL if method == "godec" else _TOL[work.dtype]
    masks = [None] * scale.numel() if observed is None else list(observed.reshape(-1, *a.shape[-2:]))

    def project(left: Tensor) -> Tensor:
        return left if sparsity is None else _sparsest(left, sparsity, per_row)

    found = []
    for matrix, own, mask in zip(work.reshape(-1, *a.shape[-2:]), energy.flatten().tolist(), masks, strict=True):
        if rank is None:
            found.append(_pcp(matrix, own**0.5, sparse_weight, mask, tol, max_iterations))
        else:
            split = altproj if method == "altproj" else godec
            found.append(split(matrix, own**0.5, rank, project, tol, max_iterations))
    return _assembled(found, a.shape[:-2], scale)


def _pcp(a: Tensor, norm: float, weight: float | None, observed: Tensor | None, tol: float, limit: int) -> Split:
    """Alternating direction method of multipliers; unobserved entries of S are free of charge."""
    fraction = 1.0 if observed is None else max(int(observed.sum()), 1) / observed.numel()
    weight = weight or (max(a.shape) * fraction) ** -0.5
    largest, entry, norm = float(spectral_norm(a)) or 1.0, float(a.abs().max()), norm or 1.0
    penalty, rank = 1.25 / largest, 8
    dual, sparse = a / max(largest, entry / weight), torch.zeros_like(a)
    for iteration in range(1, limit + 1):
        low = singular_value_threshold(a - sparse + dual / penalty, 1 / penalty, guess=rank)
        dense, rank, before = low.reconstruct(), low.rank, sparse
        sparse = soft_threshold(a - dense + dual / penalty, weight / penalty)
        if observed is not None:
            sparse = torch.where(observed, sparse, -dense)
        remainder = a - dense - sparse
        dual = dual + penalty * remainder
        error = float(squared_norm(remainder)) ** 0.5
        # The multiplier belongs to S exactly and to L but for the change of S: its size says how far from optimal.
        change = penalty * float(squared_norm(sparse - before)) ** 0.5 / (float(squared_norm(dual)) ** 0.5 or 1.0)
        if converged := max(error / norm, change) <= tol:
            break
        if iteration % _BALANCE_EVERY == 0 and iteration <= _BALANCE_UNTIL:
            penalty *= min(max((_REMAINDER_COUNTS * error / norm / max(change, 1e-30)) ** 0.5, 0.2), 5.0)
    if observed is not None:
        sparse = torch.where(observed, sparse, 0)
    return Split(low.u, low.s, low.vh, sparse, dual, error, iteration, converged)


def _sparsest(a: Tensor, sparsity: Sparsity, per_row: bool) -> Tensor:
    """The largest entries of a (m, n), as many as the pattern allows."""
    if isinstance(sparsity, tuple):
        return keep_n_of_m(a, *sparsity)
    count = round(sparsity * (a.shape[1] if per_row else a.numel())) if isinstance(sparsity, float) else sparsity
    return hard_threshold(a, count, dim=-1 if per_row else None)


def _assembled(found: list[Split], batch: torch.Size, scale: Tensor) -> RobustPCA:
    most = max(split.s.shape[0] for split in found)
    triplets = []
    for split in found:
        u, s, vh = split.u, split.s, split.vh
        if s.shape[0] < most:  # filled up by zero singular values with orthonormal vectors
            u, s, vh, _ = svd((u * s) @ vh, most, driver="exact")
        signs = column_signs(u)
        triplets.append((u * signs, s, vh * signs.mT))
    u, s, vh = (torch.stack(part).reshape(batch + part[0].shape) for part in zip(*triplets, strict=True))
    sparse = torch.stack([split.sparse for split in found])
    sparse = rescale(sparse.reshape(batch + sparse.shape[1:]), scale, "sparse part")
    duals = [split.dual for split in found if split.dual is not None]
    error = scale.new_tensor([split.error for split in found]).reshape(batch) * scale
    return RobustPCA(
        SVD(u, rescale(s, scale, "singular values"), vh, error),
        sparse,
        torch.stack(duals).reshape(sparse.shape) if duals else None,
        error,
        torch.tensor([split.iterations for split in found], device=scale.device).reshape(batch),
        torch.tensor([split.converged for split in found], device=scale.device).reshape(batch),
    )


def _check_options(
    method: str,
    rank: int | None,
    sparsity: Sparsity | None,
    sparse_weight: float | None,
    observed: Tensor | None,
    tol: float | None,
    max_iterations: int,
) -> None:
    if method not in get_args(SplitMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(SplitMethod))}, not {method!r}")
    if method == "pcp" and not (rank is None and sparsity is None):
        raise ValueError('"pcp" finds rank and sparsity itself; "godec" takes both')
    if method != "pcp" and not (observed is None and sparse_weight is None):
        raise ValueError(f'observed and sparse_weight are for "pcp", not "{method}"')
    if method != "pcp" and (rank is None or rank < 1):
        raise ValueError(f'"{method}" needs a rank of at least 1, not {rank}')
    if method == "godec" and sparsity is None:
        raise ValueError('"godec" needs sparsity: a number or fraction of nonzeros, or a pattern (N, M)')
    if isinstance(sparsity, int | float) and not (sparsity >= 0 and (sparsity <= 1 or isinstance(sparsity, int))):
        raise ValueError(f"sparsity must be a number of at least 0, or a fraction in [0, 1], not {sparsity}")
    if isinstance(sparsity, tuple) and not 0 <= sparsity[0] <= sparsity[1] > 0:
        raise ValueError(f"a pattern (N, M) must satisfy 0 <= N <= M and M >= 1, not {sparsity}")
    if sparse_weight is not None and not 0 < sparse_weight < float("inf"):
        raise ValueError(f"sparse_weight must be positive, not {sparse_weight}")
    if (tol is not None and not tol > 0) or max_iterations < 1:
        raise ValueError(f"tol must be positive and max_iterations at least 1, not {tol} and {max_iterations}")
