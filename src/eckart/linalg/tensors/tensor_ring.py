"""Tensor rings: a chain of cores whose ends are joined.

    t[i_1, ..., i_N] ≈ trace(G_1[:, i_1, :] G_2[:, i_2, :] ... G_N[:, i_N, :])
    G_k (r_k, n_k, r_{k+1}),  r_{N+1} = r_1

Reference: Q. Zhao, G. Zhou, S. Xie, L. Zhang and A. Cichocki, "Tensor ring decomposition", arXiv:1606.05535 (2016), for
the start by SVDs and for alternating least squares. Here the two are combined: the SVDs alone mix the two bonds of the
first core, which costs much of the accuracy, and alternating least squares from there need few sweeps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._prepare import rescale
from ..errors import LinalgError
from ..svd import Driver
from ._tensor import (
    Ranks,
    as_list,
    contract_chain,
    energy_of,
    join,
    leading_vectors,
    mode_gram,
    prepare_tensor,
    projection_error,
    solve_normal,
    stalled,
)
from .tensor_train import train_cores

__all__ = ["TensorRing", "tensor_ring"]


class TensorRing(NamedTuple):
    """A tensor in ring form.

    Attributes:
        cores: (r_k, n_k, r_{k+1}) for k = 1 ... N; the last bond r_{N+1} is r_1.
        error: () float64, Frobenius norm of the tensor minus this ring.
    """

    cores: tuple[Tensor, ...]
    error: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_1, ..., n_N)."""
        return tuple(core.shape[1] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Bond dimensions (r_1, ..., r_N); r_1 joins the last core to the first."""
        return tuple(core.shape[0] for core in self.cores)

    @property
    def parameters(self) -> int:
        """Numbers in the cores."""
        return sum(core.numel() for core in self.cores)

    def reconstruct(self) -> Tensor:
        """The tensor (n_1, ..., n_N). Differentiable in the cores, so trained ones may be put in."""
        return contract_chain(self.cores)


def tensor_ring(
    t: Tensor,
    ranks: Ranks,
    *,
    max_sweeps: int = 50,
    tol: float = 1e-3,
    driver: Driver = "auto",
    generator: torch.Generator | None = None,
) -> TensorRing:
    """Tensor ring of one tensor: a start by SVDs, improved by alternating least squares.

        t (n_1, ..., n_N)  ->  G_k (r_k, n_k, r_{k+1}),  k = 1 ... N

    The first SVD has rank r_1 r_2 and is split between the two bonds of the first core; what remains is a tensor train
    whose last mode carries r_1. Then each core in turn is set to the best for the others, which never raises the error.
    With r_1 = 1 the start is that of `tensor_train`, with its bounds. For larger r_1 there is no bound: the result is a
    stationary point, which mode comes first matters, and even a tensor that is a ring of these ranks is not always
    recovered. A sweep costs O(numel(t) r^2) for each mode and needs room for r^2 / n_k times the size of t. Not
    differentiable (the input is detached).

    Args:
        t: One tensor of order N >= 2 (not a batch), any float dtype; half precision is computed in float32.
        ranks: Largest r_k of every bond, N of them beginning with the one that joins the last mode to the first, or one
            number for all. Since a first SVD of n_1 rows has to fill them, r_1 r_2 is cut to n_1: put a large mode
            first.
        max_sweeps: Most sweeps over the cores; 0 for the start alone.
        tol: They end when one reduces the error by less than this fraction.
        driver: How singular vectors are found, as in `tensor_train`.
        generator: As in `svd`.

    Returns:
        Cores and the error.

    Raises:
        LinalgError: No entries, one dimension only, NaN or Inf in ``t``, not a float tensor.
        ValueError: A rank below 1 or a wrong number of them, tol not positive, max_sweeps negative.

    Example:
        >>> import torch
        >>> core = torch.einsum("ap,qb->apqb", torch.eye(2), torch.eye(2)).flatten(1, 2)  # (2, 4, 2)
        >>> t = torch.einsum("aib,bjc,cka->ijk", core, core, core)  # multiplication of 2 x 2 matrices
        >>> result = tensor_ring(t, ranks=2)
        >>> result.ranks, torch.allclose(result.reconstruct(), t, atol=1e-5)
        ((2, 2, 2), True)

    Reference:
        Zhao et al. (2016), see the module.
    """
    if not tol > 0 or max_sweeps < 0:
        raise ValueError(f"tol must be positive and max_sweeps at least 0, not {tol} and {max_sweeps}")
    work, scale, energy = prepare_tensor(t)
    if work.ndim < 2:
        raise LinalgError.about("t", t, "has no bonds", "give it two dimensions or more")
    cores = _start(work, as_list(ranks, work.ndim, "bond"), driver, generator)
    missed = energy_of(work - contract_chain(cores))
    floor = (10 * torch.finfo(work.dtype).eps) ** 2 * energy
    for _ in range(max_sweeps):
        before, (new, after) = missed, _sweep(work, cores, energy)
        if after < before:
            cores, missed = new, after
        if stalled(before, after, tol, floor):
            break
    error = energy_of(work - contract_chain(cores)).sqrt()
    return TensorRing((rescale(cores[0], scale, "cores"), *cores[1:]), error * scale)


def _start(t: Tensor, wanted: list[int], driver: Driver, generator: torch.Generator | None) -> list[Tensor]:
    """TR-SVD: one SVD for both bonds of the first core, then a train of the rest."""
    first_size, *others = t.shape
    room = min(first_size, t.numel() // first_size)
    first = min(wanted[0], max(math.isqrt(room), room // wanted[1]))
    second = min(wanted[1], room // first)
    basis, _ = leading_vectors(t, 0, first * second, driver=driver, generator=generator)
    rest = (basis.mT @ t.flatten(1)).reshape(first, second, *others).movedim(0, -1)
    # The open bonds at the ends are part of the outer modes for as long as the train is made.
    sizes = [second * others[0], *others[1:]]
    sizes[-1] *= first
    train = train_cores(rest.reshape(sizes), list(wanted[2:]), None, driver, generator)
    train[0] = train[0].reshape(second, others[0], -1)
    train[-1] = train[-1].reshape(-1, others[-1], first)
    return [basis.reshape(first_size, first, second).transpose(0, 1), *train]


def _sweep(t: Tensor, cores: list[Tensor], energy: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every core once set to the least squares solution for the others; the cores and the squared error."""
    cores = list(cores)
    for k, n in enumerate(t.shape):
        chain = join([*cores[k + 1 :], *cores[:k]])  # (r_{k+1}, all other modes from k + 1 on, r_k)
        design = chain.transpose(1, 2).flatten(0, 1)
        targets = t.permute(*range(k, t.ndim), *range(k)).reshape(n, -1)
        rhs = design @ targets.mT
        solution = solve_normal(mode_gram(design, 0), rhs)
        cores[k] = solution.reshape(chain.shape[0], chain.shape[2], n).permute(1, 2, 0)
    kept = (rhs.to(torch.float64) * solution.to(torch.float64)).sum()
    return cores, projection_error(t, energy, kept, lambda: contract_chain(cores)).square()
