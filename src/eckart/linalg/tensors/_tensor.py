"""What the tensor decompositions share: checks, leading vectors of an unfolding, errors, chains of cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._prepare import Prepared, all_finite, prepare, squared_norm
from ..eigh import eigh
from ..errors import LinalgError
from ..solve import solve_spd
from ..svd import Driver, svd
from .products import unfold

__all__ = [
    "Ranks",
    "as_list",
    "check_finite",
    "contract_chain",
    "energy_of",
    "join",
    "leading_vectors",
    "mode_gram",
    "prepare_tensor",
    "projection_error",
    "solve_normal",
    "stalled",
]

Ranks = int | Sequence[int]

_CHUNK = 1 << 17  # entries converted to float64 at a time: one megabyte, so it stays in the cache
# Unfoldings with fewer rows go through their Gram matrix; from here on `svd` may choose random sampling instead.
_GRAM_BELOW = 256


def check_finite(t: Tensor, name: str) -> None:
    """Raises LinalgError where t is not real floating point or has NaN or Inf, before it is copied or reshaped."""
    if not t.is_floating_point():
        raise LinalgError.about(name, t, "is not real floating point", "convert it with .float() first")
    if not all_finite(t):
        raise LinalgError.about(name, t, "contains NaN or Inf", "find where it comes from, or mask it")


def prepare_tensor(t: Tensor, name: str = "t") -> Prepared:
    """Checks, promotes and scales a tensor as `prepare` does a matrix; contiguous, scale and energy 0-dimensional.

    Raises:
        LinalgError: No dimensions or no entries, not real floating point, NaN or Inf.
    """
    if t.ndim == 0 or t.numel() == 0:
        raise LinalgError.about(name, t, "is no tensor with entries", "give it at least one dimension, none of size 0")
    check_finite(t, name)
    work, scale, energy = prepare(t.reshape(-1, t.shape[-1]), name)
    return Prepared(work.reshape(t.shape), scale, energy)


def as_list(ranks: Ranks, count: int, what: str) -> list[int]:
    """One rank for each ``what`` (mode, bond), ``count`` in all; a single number stands for all of them."""
    if isinstance(ranks, int):
        if ranks < 1:
            raise ValueError(f"ranks must be at least 1, not {ranks}")
        return [ranks] * count
    if len(ranks) != count:
        raise ValueError(f"ranks has {len(ranks)} entries; give {count}, one for each {what}, or a single number")
    for index, rank in enumerate(ranks):
        if rank < 1:
            raise ValueError(f"ranks[{index}] must be at least 1, not {rank}")
    return list(ranks)


def energy_of(t: Tensor) -> Tensor:
    """Sum of squares of all entries, () float64."""
    return squared_norm(t.reshape(-1, t.shape[-1]))


def mode_gram(t: Tensor, mode: int) -> Tensor:
    """Gram matrix of an unfolding, unfold(t, mode) unfold(t, mode)ᵀ, (n, n) float64.

    The products are made in float64, because the eigenvectors of a float32 Gram are blind to singular values below
    3e-4 of the largest. Only a piece of t at a time is converted, so there is no float64 copy of t.
    """
    n = t.shape[mode]
    fibres = t.reshape(math.prod(t.shape[:mode]), n, -1).movedim(1, 0)
    gram = t.new_zeros(n, n, dtype=torch.float64)
    for rows in fibres.split(max(1, _CHUNK // (n * fibres.shape[2])), dim=1):
        for piece in rows.split(max(1, _CHUNK // (n * rows.shape[1])), dim=2):
            wide = piece.to(torch.float64).reshape(n, -1)
            gram.addmm_(wide, wide.mT)
    return gram


def leading_vectors(
    t: Tensor, mode: int, rank: int | None, *, driver: Driver = "auto", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors of unfold(t, mode), (n, k), and their squared singular values, (k,) float64.

    For a well-scaled t. "auto" takes the cheaper side: the eigenvectors of the Gram matrix where the unfolding is wide
    and low (and single precision, for the Gram of a float64 matrix loses digits), else what `svd` chooses.

    Args:
        t: Tensor of order N.
        mode: Which unfolding.
        rank: At most so many; None for all, min(n, product of the other sizes).
        driver: As in `svd`.
        generator: As in `svd`.
    """
    n = t.shape[mode]
    others = t.numel() // n
    low = n <= others and (n < _GRAM_BELOW or rank is None)
    if driver == "auto" and t.dtype == torch.float32 and low:
        values, vectors = eigh(mode_gram(t, mode), rank)
        return vectors.to(t.dtype), values.clamp(min=0)
    u, s, _, _ = svd(unfold(t, mode), rank, driver=driver, generator=generator)
    return u, s.to(torch.float64).square()


def projection_error(t: Tensor, energy: Tensor, kept: Tensor, rebuild: Callable[[], Tensor]) -> Tensor:
    """Frobenius norm of t minus an orthogonal projection of it, () float64.

    By Pythagoras it is sqrt(energy - kept), with the squared norms of t and of the projection. The difference carries
    an absolute error of a few eps * energy, so where it is smaller than 2000 of those the residual is formed.
    """
    left = energy - kept
    if bool(left > 2000 * torch.finfo(t.dtype).eps * energy):
        return left.sqrt()
    return energy_of(t - rebuild()).sqrt()


def stalled(before: Tensor, after: Tensor, tol: float, floor: Tensor) -> bool:
    """Whether a sweep took less than the fraction ``tol`` off the error, or no more than rounding can.

    Args:
        before: Squared error before the sweep.
        after: Squared error after it.
        tol: Fraction of the error, which is half that of its square.
        floor: Changes of the squared error up to this are rounding.
    """
    return bool(before - after <= torch.maximum(2 * tol * before, floor))


def solve_normal(gram: Tensor, rhs: Tensor) -> Tensor:
    """Solution of the normal equations gram x = rhs in rhs's dtype, for gram (k, k) float64 and rhs (k, p).

    A bare Cholesky where that is safe, because in alternating least squares on small tensors the checks of
    `solve_spd` take as long as everything else; where gram is singular to the rounding of rhs, `solve_spd`.
    """
    lower, info = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal().square()
    if not bool(info) and bool(pivots.min() > len(gram) * torch.finfo(rhs.dtype).eps * pivots.max()):
        return torch.cholesky_solve(rhs.to(torch.float64), lower).to(rhs.dtype)
    return solve_spd(gram.to(rhs.dtype), rhs)


def join(cores: Sequence[Tensor]) -> Tensor:
    """Contracts neighbouring cores (r_0, n_1, r_1), ..., (r_{N-1}, n_N, r_N) to one, (r_0, n_1 ... n_N, r_N)."""
    result = cores[0]
    for core in cores[1:]:
        result = torch.einsum("amr,rnb->amnb", result, core).flatten(1, 2)
    return result


def contract_chain(cores: Sequence[Tensor]) -> Tensor:
    """The tensor (n_1, ..., n_N) of a whole chain of cores, first and last bond joined; r_0 = r_N = 1 is a train."""
    if len(cores) == 1:
        return torch.einsum("ana->n", cores[0])
    # The trace is taken along with the last core, so that nothing larger than r_0 times the tensor without it exists.
    result = torch.einsum("amr,rna->mn", join(cores[:-1]), cores[-1])
    return result.reshape([core.shape[1] for core in cores])
