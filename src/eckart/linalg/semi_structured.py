"""Semi-structured sparsity: N of every M neighbours, and a dense matrix times such a sparse one.

    W = D S + remainder,   W (m, n), D (m, r) dense, S (r, n) with s nonzeros a column, or N of every M in a column

Each column of W uses its own few columns of D, where a low-rank factorisation uses all r: s = r is the truncated SVD.
Blocks of c neighbouring columns can share one support, so that D S becomes small dense products; N:M patterns are what
sparse tensor cores take.

Reference: Chand et al., "DSFormer", arXiv:2312.13211, for the form (this is the plain factorisation, without training
through it); S. Foucart, "Hard thresholding pursuit", SIAM J. Numerical Analysis 49 (2011), for the choice of supports.
What differs: a support changes only where the exact least-squares fit on the new one is better, so no sweep raises the
error, which starts at or below that of the truncated SVD of rank s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._prepare import all_finite, prepare, result_dtype, squared_norm
from .dictionary import Dictionary, Factored, descend, factor_each
from .errors import LinalgError
from .pursuit import best_fit, expand
from .soft_threshold import accurate_driver
from .solve import solve_spd
from .svd import svd

__all__ = ["dense_sparse", "keep_n_of_m", "n_of_m_mask"]


def n_of_m_mask(a: Tensor, n: int, m: int, *, dim: int = -1, weight: Tensor | None = None) -> Tensor:
    """Marks the ``n`` most important of every ``m`` neighbours along a dimension.

        max over masks with n of every m of  sum mask_ij weight_ij a_ij^2

    Exactly n of each m are marked; of equal ones the first. O(a.numel() log m).

    Args:
        a: (..., rows, columns), any float dtype.
        n: Entries kept in each group, 0 <= n <= m.
        m: Length of a group; must divide the length of the dimension.
        dim: Dimension along which the groups lie, -1 for neighbours in a row.
        weight: Importance of each squared entry, of at least 0, broadcast against a: for a weight matrix (out, in), the
            mean squares of its inputs. None for ones.

    Returns:
        Mask of a's shape, bool.

    Raises:
        LinalgError: NaN or Inf, not a float matrix, a dimension that m does not divide, weight negative or of the wrong
            shape.
        ValueError: n or m out of range.

    Example:
        >>> import torch
        >>> n_of_m_mask(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 2, 4).int().tolist()
        [[0, 1, 1, 0]]
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n of m must satisfy 0 <= n <= m and m >= 1, not {n} of {m}")
    work = prepare(a).matrix.abs()
    if a.shape[dim] % m:
        raise LinalgError.about("a", a, f"has a dimension that {m} does not divide", "pad it, or choose another m")
    if weight is not None:
        work = work * _root(weight, a)
    groups = work.movedim(dim, -1).unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return mask.flatten(-2).movedim(-1, dim)


def keep_n_of_m(a: Tensor, n: int, m: int, *, dim: int = -1, weight: Tensor | None = None) -> Tensor:
    """Keeps the ``n`` most important of every ``m`` neighbours, zero elsewhere: the nearest N:M sparse matrix.

        min over N:M sparse b of  sum weight_ij (a_ij - b_ij)^2

    Arguments and errors are those of ``n_of_m_mask``.

    Returns:
        b of a's shape, in float64 for float64 input and float32 otherwise.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
        >>> keep_n_of_m(a, 2, 4).tolist()
        [[0.0, -3.0, 2.0, 0.0]]
        >>> keep_n_of_m(a, 2, 4, weight=torch.tensor([100.0, 1.0, 1.0, 1.0])).tolist()
        [[1.0, -3.0, 0.0, 0.0]]
    """
    mask = n_of_m_mask(a, n, m, dim=dim, weight=weight)
    return torch.where(mask, a.detach(), 0).to(result_dtype(a))


def dense_sparse(
    w: Tensor,
    inner: int,
    *,
    nonzeros: int | None = None,
    n_of_m: tuple[int, int] | None = None,
    block: int = 1,
    sweeps: int = 10,
    start: Tensor | None = None,
    support: Tensor | None = None,
) -> Dictionary:
    """Factors w into a dense and a semi-structured sparse matrix by alternating least squares.

        w (m, n) = D (m, r) S (r, n) + remainder

    Starts from the leading left singular vectors. A sweep solves for D with S fixed, proposes for each block of columns
    the support of the largest entries of S + Dᵀ(w - D S), and solves for the values on the better of the old and the
    new support. The error never rises, and is at most that of the truncated SVD of rank s, equal to it for s = r. On
    return the remainder is orthogonal to the columns of D that each column of S uses. A sweep costs
    O(m n r + n s^3 / c), several times less than one of ``dictionary``, which searches supports by pursuit; on weights
    of language models the result is about as good. A local optimum: the problem is NP-hard. Not differentiable.

    Args:
        w: (..., m, n), any float dtype; the matrices of a batch are factored one by one.
        inner: Number r of columns of D, at most min(m, n).
        nonzeros: Number s of nonzeros in each column of S, at most r. Give this or ``n_of_m``.
        n_of_m: Pattern (N, M): N nonzeros in each M neighbours of a column of S; M divides r, and s = r N / M.
        block: Number c of neighbouring columns that share one support; divides n.
        sweeps: Updates of D; ends earlier when one gains nothing. 0 keeps the singular vectors.
        start: Initial D (..., m, r), columns of any length, such as the atoms of an earlier call.
        support: (n / block, s) integers, positions of nonzeros to begin with, such as the indices of an earlier call; a
            block changes them only for better ones. For one matrix and with ``start``.

    Returns:
        D with columns of unit length as ``atoms`` and S as ``codes``, in float64 for float64 input, else float32.

    Raises:
        LinalgError: Not a float matrix, empty, NaN or Inf; n not a multiple of block; a start or support that
            does not fit.
        ValueError: An option out of range, both or none of nonzeros and n_of_m.

    Example:
        >>> import torch
        >>> w = torch.block_diag(torch.ones(2, 4), torch.ones(2, 4))
        >>> result = dense_sparse(w, 2, nonzeros=1, block=4)
        >>> bool(result.error < 1e-6), result.num_parameters(), tuple(result.codes.indices.shape)
        (True, 16, (2, 1))
    """
    _check_options(inner, nonzeros, n_of_m, block, sweeps)
    smaller = min(w.shape[-2:]) if w.ndim > 1 and w.numel() else inner  # anything else is refused below
    if inner > smaller:
        raise ValueError(f"inner must be at most min(m, n) = {smaller}, not {inner}; dictionary takes more")
    if w.ndim and w.shape[-1] % block:
        raise LinalgError.about("w", w, f"has a width that block = {block} does not divide", "choose another block")

    if support is not None:
        sparsity = nonzeros if n_of_m is None else inner * n_of_m[0] // n_of_m[1]
        if w.ndim != 2 or start is None or support.shape != (w.shape[1] // block, sparsity):
            raise LinalgError.about(
                "support",
                support,
                "does not fit",
                f"give (columns / block, {sparsity}) integers for one w, and a start",
            )
        support = support.to(torch.int64)
        if bool((support < 0).any() or (support >= inner).any()):
            raise LinalgError.about("support", support, "is out of range", f"give integers from 0 to {inner - 1}")

    def choose(score: Tensor) -> Tensor:
        if nonzeros is not None:
            return score.topk(nonzeros, dim=1).indices
        assert n_of_m is not None
        return n_of_m_mask(score, *n_of_m).nonzero()[:, 1].reshape(len(score), -1)

    def factor(matrix: Tensor, d: Tensor | None) -> Factored:
        if d is None:
            d = svd(matrix, inner, driver=accurate_driver(matrix, inner)).u
            if n_of_m is not None:  # every group holds strong and weak directions, so that the s strongest can be kept
                d = d.unflatten(1, (n_of_m[1], -1)).mT.flatten(1)
        wide = matrix.to(torch.float64)
        first = _fit(wide, d, wide.new_zeros(w.shape[-1], inner), block, choose, support)
        return descend(first, lambda old: _fit(wide, *_solve_dense(wide, old), block, choose, old.indices), sweeps)

    return factor_each(w, inner, start, factor)


def _solve_dense(w: Tensor, old: Factored) -> tuple[Tensor, Tensor]:
    """D (m, r) of unit columns that fits best with S fixed, and Sᵀ (n, r) float64 scaled accordingly."""
    sparse = _rows(old).to(torch.float64)
    d = solve_spd(sparse.mT @ sparse, sparse.mT @ w.mT).mT
    lengths = torch.linalg.vector_norm(d, dim=0)
    d = torch.where(lengths > 0, d / torch.where(lengths > 0, lengths, 1), old.d)  # an unused column stays as it was
    return d.to(old.d.dtype), sparse * lengths


def _fit(
    w: Tensor,
    d: Tensor,
    sparse: Tensor,
    block: int,
    choose: Callable[[Tensor], Tensor],
    old: Tensor | None = None,
) -> Factored:
    """Supports by one step of hard thresholding pursuit from ``sparse``, and the values that fit best on them."""
    wide = d.to(torch.float64)
    gram, target = wide.mT @ wide, w.mT @ wide
    score = (sparse + target - sparse @ gram).unflatten(0, (-1, block)).square().sum(dim=1)
    supports = [choose(score)] if old is None else [old, choose(score)]
    indices, values = best_fit(gram, target.unflatten(0, (-1, block)), supports, d.dtype)
    found = Factored(d, values.flatten(0, 1), indices, d.new_zeros(()))
    return found._replace(error=squared_norm(w.to(d.dtype) - d @ _rows(found).mT).sqrt())


def _rows(factored: Factored) -> Tensor:
    """Sᵀ (n, r) with its zeros."""
    block = len(factored.values) // len(factored.indices)
    return expand(factored.values, factored.indices.repeat_interleave(block, dim=0), factored.d.shape[1])


def _check_options(inner: int, nonzeros: int | None, n_of_m: tuple[int, int] | None, block: int, sweeps: int) -> None:
    if inner < 1 or block < 1 or sweeps < 0:
        raise ValueError(f"inner and block must be at least 1 and sweeps 0, not {inner}, {block} and {sweeps}")
    if (nonzeros is None) == (n_of_m is None):
        raise ValueError("give either nonzeros, the number in each column of S, or n_of_m, the pattern")
    if nonzeros is not None and not 1 <= nonzeros <= inner:
        raise ValueError(f"nonzeros must be between 1 and inner = {inner}, not {nonzeros}")
    if n_of_m is not None and (not 1 <= n_of_m[0] <= n_of_m[1] or inner % n_of_m[1]):
        raise ValueError(f"n_of_m must be (N, M) with 1 <= N <= M and M dividing inner = {inner}, not {n_of_m}")


def _root(weight: Tensor, a: Tensor) -> Tensor:
    """Square root of a checked weight, relative to its largest."""
    try:
        fits = torch.broadcast_shapes(weight.shape, a.shape) == a.shape
    except RuntimeError:
        fits = False
    if not fits or not all_finite(weight) or bool((weight < 0).any()):
        remedy = f"give finite numbers of at least 0 that broadcast to {tuple(a.shape)}"
        raise LinalgError.about("weight", weight, "is no weight for a", remedy)
    wide = weight.detach().to(torch.float64)
    return (wide / wide.amax().clamp(min=torch.finfo(torch.float64).tiny)).sqrt().to(result_dtype(a))
