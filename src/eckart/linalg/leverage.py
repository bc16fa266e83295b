"""How much each row of a matrix counts for its span, and each term of a matrix product for the product.

    l_i = ||u_i||^2,  a = u diag(s) vh (m, n)        leverage score; a factor s_j^2 / (s_j^2 + λ) with a ridge λ
    a b = sum_j a_(:, j) b_(j, :)                    scores ||a_(:, j)|| ||b_(j, :)||, a (m, p), b (p, n)

Reference: M. W. Mahoney and P. Drineas, "CUR matrix decompositions for improved data analysis", PNAS 106 (2009);
A. Alaoui and M. W. Mahoney, "Fast randomized kernel ridge regression with statistical guarantees", NeurIPS 2015,
arXiv:1411.0306; P. Drineas, R. Kannan and M. W. Mahoney, "Fast Monte Carlo algorithms for matrices I", SIAM J. Comput.
36 (2006). Different here: ridges are in units of the mean diagonal, so that scores do not depend on scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ._prepare import prepare, rescale, result_dtype, squared_norm
from .eigh import eigh, symmetric_part
from .errors import LinalgError
from .svd import svd
from .whiten import NEGATIVE

__all__ = ["ColumnRow", "TermSelection", "column_row_product", "leverage_scores", "ridge_leverage_scores"]

TermSelection = Literal["norm", "top"]

_SMALL = 1e-6  # a smaller ridge would cost the inverse of gram + λ I more than half of its digits


def leverage_scores(a: Tensor, rank: int | None = None, *, ridge: float = 0.0) -> Tensor:
    """Leverage scores of the rows of a matrix: the diagonal of the projection onto its leading left singular vectors.

        l = diag(a (aᵀa + λ I)^-1 aᵀ),   a (m, n) truncated to ``rank``,   λ = ridge * mean diag aᵀa

    Each score lies between 0 and 1. Without a ridge they sum to the rank; with one, to the effective dimension
    sum s_j^2 / (s_j^2 + λ). For the columns of a, give its transpose. O(m n min(m, n)), or O(m n rank) truncated. Not
    differentiable.

    Args:
        a: (..., m, n), any float dtype.
        rank: Number of leading singular vectors. None for all up to the numerical rank, which leaves out singular
            values below max(m, n) * eps * s_1.
        ridge: In units of the mean diagonal of aᵀa.

    Returns:
        (..., m) float64.

    Raises:
        LinalgError: NaN or Inf in ``a``, or not a float matrix.
        ValueError: rank below 1, ridge negative.

    Example:
        >>> import torch
        >>> leverage_scores(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])).tolist()
        [1.0, 1.0, 0.0]

    Reference:
        Mahoney and Drineas (2009).
    """
    _check_ridge(ridge)
    work, _, energy = prepare(a)
    u, s, _, _ = svd(work, rank)
    penalty = ridge * energy[..., None] / max(1, work.shape[-1])
    cutoff = max(work.shape[-2:]) * torch.finfo(work.dtype).eps
    return _weighted_diagonal(s.to(torch.float64).square(), u.to(torch.float64), penalty, cutoff * cutoff)


def ridge_leverage_scores(gram: Tensor, ridge: float) -> Tensor:
    """Ridge leverage scores of the variables of a positive semidefinite matrix.

        l_i = [G (G + λ I)^-1]_ii = 1 - λ [(G + λ I)^-1]_ii,   G (n, n),   λ = ridge * mean diag G

    For G = xᵀx these are the leverage scores of the columns of x with this λ, without x. They sum to the effective
    dimension, at most n / ridge. One Cholesky factorisation and inverse in float64, n^3 multiply-adds; below a ridge
    of 1e-6 the eigenvectors, about 9 n^3. Not differentiable.

    Args:
        gram: (..., n, n) symmetric positive semidefinite, any float dtype.
        ridge: In units of the mean diagonal; for an absolute λ, as in MoDeGPT, give λ / mean diag G. With 0 the scores
            sum to the numerical rank, which leaves out eigenvalues below n * eps of the largest.

    Returns:
        (..., n) float64, between 0 and 1.

    Raises:
        LinalgError: Not symmetric positive semidefinite, NaN or Inf.
        ValueError: ridge negative.

    Example:
        >>> import torch
        >>> ridge_leverage_scores(torch.diag(torch.tensor([4.0, 4.0])), ridge=3.0).tolist()  # 4 / (4 + 12)
        [0.25, 0.25]

    Reference:
        Alaoui and Mahoney, arXiv:1411.0306.
    """
    _check_ridge(ridge)
    work, _, _ = prepare(gram, "gram", dtype=torch.float64, square=True)
    work = symmetric_part(work, "gram")
    size = work.shape[-1]
    penalty = ridge * work.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None] / max(1, size)
    if ridge >= _SMALL:
        eye = torch.eye(size, dtype=work.dtype, device=work.device)
        lower, info = torch.linalg.cholesky_ex(work + penalty[..., None] * eye)
        if not bool(info.any()):
            inverse = torch.cholesky_inverse(lower).diagonal(dim1=-2, dim2=-1)
            return (1 - penalty * inverse).clamp(0, 1)
    values, vectors = eigh(work)  # also where the matrix is zero or, by rounding, not quite positive
    if bool((values < -NEGATIVE * values[..., :1].abs()).any()):
        raise LinalgError.about("gram", gram, "is not positive semidefinite", "give a Gram matrix such as x.T @ x")
    return _weighted_diagonal(values, vectors, penalty, size * torch.finfo(result_dtype(gram)).eps)


@dataclass(frozen=True)
class ColumnRow:
    """Chosen terms of a matrix product a b.

    Attributes:
        left: (..., m, k) columns of a, scaled.
        right: (..., k, n) rows of b, scaled alike.
        indices: (..., k) int64, ascending; with repetitions where they were drawn.
        scores: (..., p) float64, ||a_(:, j)|| ||b_(j, :)|| of every term.
        error: (...,) float64, Frobenius norm of ``a b - left right``.
    """

    left: Tensor
    right: Tensor
    indices: Tensor
    scores: Tensor
    error: Tensor

    def reconstruct(self) -> Tensor:
        """left right, (..., m, n)."""
        return self.left @ self.right


def column_row_product(
    a: Tensor, b: Tensor, rank: int, *, select: TermSelection = "norm", generator: torch.Generator | None = None
) -> ColumnRow:
    """CR decomposition of a product: a few of its p outer products of a column and a row.

        a b = sum_j a_(:, j) b_(j, :)  ~  left right,   a (m, p),   b (p, n),   left (m, k),   right (k, n)

    "norm" is an unbiased estimate with mean squared error ((sum_j score_j)^2 - ||a b||_F^2) / k. "top" is biased, and
    off by at most the sum of the scores left out: small when few terms carry the product. Its indices are a choice of
    features, as MoDeGPT makes for queries and keys. Choosing costs O((m + n) p), but the exact error as much as the
    product itself or, if that is less, O(p^2 (m + n)): this is for choosing terms, not for multiplying faster. Not
    differentiable.

    Args:
        a: (..., m, p), any float dtype.
        b: (..., p, n), the same batch.
        rank: Number k of terms; "top" takes at most p.
        select: "norm": drawn with replacement with probability q_j in proportion to the scores, column and row each
            divided by sqrt(k q_j). "top": the terms with the largest scores, as they are.
        generator: Source of the draw, on a's device; None for a private one with a fixed seed.

    Returns:
        The terms as two factors, their indices, all scores and the error; in float64 if a or b is, else float32.

    Raises:
        LinalgError: Shapes that do not fit, NaN or Inf, not float matrices.
        ValueError: Unknown select, rank below 1.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)
        >>> result = column_row_product(a, b, 1, select="top")
        >>> result.indices.tolist(), result.scores.tolist(), float(result.error)
        ([0], [3.0, 1.0], 1.0)

    Reference:
        Drineas, Kannan and Mahoney (2006); Lin et al., "MoDeGPT", arXiv:2408.09632, for "top".
    """
    if select not in get_args(TermSelection):
        raise ValueError(f"select must be one of {', '.join(get_args(TermSelection))}, not {select!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    dtype = result_dtype(a, b)
    left, left_scale, _ = prepare(a, dtype=dtype)
    right, right_scale, _ = prepare(b, "b", dtype=dtype)
    if left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-2]:
        remedy = "give b as many rows as a has columns, and the same batch"
        raise LinalgError.about("b", b, f"does not fit a of shape {tuple(a.shape)}", remedy)
    scores = torch.linalg.vector_norm(left, dim=-2, dtype=torch.float64)
    scores = scores * torch.linalg.vector_norm(right, dim=-1, dtype=torch.float64)
    if select == "top":
        indices = scores.argsort(dim=-1, descending=True, stable=True)[..., :rank].sort(dim=-1).values
        weights = torch.ones_like(indices, dtype=torch.float64)
    else:
        indices, weights = _draw_terms(scores, rank, generator)
    kept = torch.zeros_like(scores).scatter_add_(-1, indices, weights)
    error = _weighted_norm(left, 1 - kept, right)
    root = weights.sqrt().to(dtype)
    left = left.gather(-1, indices[..., None, :].expand(*left.shape[:-1], -1)) * root[..., None, :]
    right = right.gather(-2, indices[..., None].expand(*indices.shape, right.shape[-1])) * root[..., None]
    scale = left_scale * right_scale
    left, right = rescale(left, left_scale, "left"), rescale(right, right_scale, "right")
    return ColumnRow(left, right, indices, scores * scale[..., None], error * scale)


def _draw_terms(scores: Tensor, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Indices drawn in proportion to the scores, ascending, and the weight 1 / (count * probability) of each."""
    if generator is None:
        generator = torch.Generator(device=scores.device).manual_seed(0)
    total = scores.sum(dim=-1, keepdim=True)
    chances = torch.where(total > 0, scores / torch.where(total > 0, total, 1), 1 / scores.shape[-1])
    drawn = torch.multinomial(chances.reshape(-1, scores.shape[-1]), count, replacement=True, generator=generator)
    indices = drawn.reshape(*scores.shape[:-1], count).sort(dim=-1).values
    return indices, 1 / (count * chances.gather(-1, indices))


def _weighted_norm(a: Tensor, weights: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of a diag(weights) b in float64, by the p x p Gram matrices or the product, whichever is less."""
    (m, p), n = a.shape[-2:], b.shape[-1]
    a = a.to(torch.float64) * weights[..., None, :]
    b = b.to(torch.float64)
    if p * (m + n) < m * n:
        return ((a.mT @ a) * (b @ b.mT)).sum(dim=(-2, -1)).clamp(min=0).sqrt()
    return squared_norm(a @ b).sqrt()


def _weighted_diagonal(powers: Tensor, vectors: Tensor, penalty: Tensor, cutoff: float) -> Tensor:
    """sum_j v_ij^2 p_j / (p_j + penalty) over the powers (..., k), descending, that are above cutoff * p_1."""
    wanted = powers > cutoff * powers[..., :1]
    weights = torch.where(wanted, powers / torch.where(wanted, powers + penalty, 1), 0)
    return torch.linalg.vecdot(vectors * weights[..., None, :], vectors).clamp(0, 1)


def _check_ridge(ridge: float) -> None:
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be a number of at least 0, not {ridge}")
