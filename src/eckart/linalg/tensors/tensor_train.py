"""Tensor trains: a tensor of many modes as a chain of small cores.

    t[i_1, ..., i_N] ≈ G_1[:, i_1, :] G_2[:, i_2, :] ... G_N[:, i_N, :],     G_k (r_{k-1}, n_k, r_k), r_0 = r_N = 1

One truncated singular value decomposition per bond, from left to right: the rows of the remainder are (bond, mode),
its columns all later modes. Each is an orthogonal projection, so the squared errors add up.

Reference: I. V. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33 (2011).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._prepare import rescale
from ..solve import qr
from ..svd import Driver
from ._tensor import Ranks, as_list, contract_chain, energy_of, leading_vectors, prepare_tensor, projection_error

__all__ = ["TensorTrain", "bond_caps", "tensor_train", "train_cores"]


class TensorTrain(NamedTuple):
    """A tensor in train form.

    Attributes:
        cores: (r_{k-1}, n_k, r_k) for k = 1 ... N. All but the last are left-orthonormal: flattened to
            (r_{k-1} n_k, r_k) their columns are orthonormal.
        error: () float64, Frobenius norm of the tensor minus this train.
    """

    cores: tuple[Tensor, ...]
    error: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_1, ..., n_N)."""
        return tuple(core.shape[1] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Bond dimensions (r_1, ..., r_{N-1})."""
        return tuple(core.shape[2] for core in self.cores[:-1])

    @property
    def parameters(self) -> int:
        """Numbers in the cores."""
        return sum(core.numel() for core in self.cores)

    def reconstruct(self) -> Tensor:
        """The tensor (n_1, ..., n_N). Differentiable in the cores, so trained ones may be put in."""
        return contract_chain(self.cores)

    def round(self, ranks: Ranks | None = None, *, tol: float | None = None) -> TensorTrain:
        """Lowers the ranks of the train without forming the tensor.

        A QR of every core from right to left, then a truncated SVD per bond from left to right, O(N n r^3). Same
        error bounds as `tensor_train` of the reconstructed tensor. Not differentiable.

        Args:
            ranks: As in `tensor_train`.
            tol: As in `tensor_train`, relative to this train.

        Returns:
            A train whose ``error`` is the distance to THIS one. Its distance to the tensor from which this one came is
            at most the sum of the two errors.

        Raises:
            LinalgError: NaN or Inf in a core, or the tensor overflows their dtype.
            ValueError: As in `tensor_train`.
        """
        caps = bond_caps(ranks, tol, len(self.cores) - 1)
        cores: list[Tensor] = []
        carry, scale = self.cores[-1].new_ones(1, 1), torch.ones((), dtype=torch.float64, device=self.error.device)
        for k, core in reversed(list(enumerate(self.cores))):
            work, own, _ = prepare_tensor(core, f"cores[{k}]")
            work = work @ carry.to(work.dtype)
            size = energy_of(work).sqrt().clamp(min=torch.finfo(work.dtype).tiny)  # so that no product overflows
            work, scale = work / size.to(work.dtype), scale * own * size
            if k:
                q, r = qr(work.flatten(1).mT)
                work, carry = q.mT.unflatten(1, core.shape[1:2] + work.shape[2:]), r.mT
            cores.insert(0, work)
        loss = None if tol is None else tol**2 * energy_of(cores[0])
        left_out = torch.zeros_like(scale)
        for k in range(len(cores) - 1):
            rows = cores[k].flatten(0, 1)
            basis, _ = _basis(rows, caps[k], _share(loss, left_out, len(caps) - k))
            carry = basis.mT @ rows
            left_out = left_out + energy_of(rows - basis @ carry)
            cores[k] = basis.unflatten(0, cores[k].shape[:2])
            cores[k + 1] = torch.einsum("ab,bnc->anc", carry, cores[k + 1])
        cores[-1] = rescale(cores[-1], scale, "cores")
        return TensorTrain(tuple(cores), left_out.sqrt() * scale)


def tensor_train(
    t: Tensor,
    ranks: Ranks | None = None,
    *,
    tol: float | None = None,
    driver: Driver = "auto",
    generator: torch.Generator | None = None,
) -> TensorTrain:
    """Tensor train of one tensor, by given ranks, to a given accuracy, or both (TT-SVD).

        ||t - train||_F <= tol ||t||_F,     ||t - train||_F <= sqrt(N - 1) * (error of the best train of these ranks)

    The first SVD dominates, as a rule: its Gram matrix costs n_1 numel(t), after which the remainder is smaller by
    r_1 / n_1. With tol all singular values of every unfolding are worked out. The second bound grows by up to 1 %
    where `svd` samples (256 rows and columns or more, low rank, no tol). The order of the modes matters: neighbours
    should be the modes that depend on each other. For a matrix it is the truncated SVD. Not differentiable (the input
    is detached).

    Args:
        t: One tensor of order N >= 1 (not a batch), any float dtype; half precision is computed in float32.
        ranks: Largest r_k of every bond, N - 1 of them, or one number for all. None for no limit: without tol the
            train is then exact. Cut to what the unfoldings can have.
        tol: Allowed relative error; the ranks are as small as that permits, its square being shared out evenly over
            the bonds and what one leaves unused going to the next. With ranks as well, whichever is smaller.
        driver: How singular vectors are found, as in `svd`. "auto" takes the Gram matrix, in float64, for low wide
            unfoldings in single precision.
        generator: As in `svd`.

    Returns:
        Cores and the error.

    Raises:
        LinalgError: No entries, NaN or Inf in ``t``, not a float tensor.
        ValueError: A rank below 1 or a wrong number of them, tol not positive.

    Example:
        >>> import torch
        >>> i = torch.arange(4.0)
        >>> t = i[:, None, None] + i[:, None] + i  # a sum of N terms has ranks 2
        >>> result = tensor_train(t, tol=1e-5)
        >>> result.ranks, torch.allclose(result.reconstruct(), t, atol=1e-4)
        ((2, 2), True)

    Reference:
        Oseledets (2011), see the module.
    """
    work, scale, energy = prepare_tensor(t)
    caps = bond_caps(ranks, tol, work.ndim - 1)
    loss = None if tol is None else tol**2 * energy
    cores = train_cores(work, caps, loss, driver, generator)
    error = projection_error(work, energy, energy_of(cores[-1]), lambda: contract_chain(cores))
    cores[-1] = rescale(cores[-1], scale, "cores")
    return TensorTrain(tuple(cores), error * scale)


def train_cores(
    t: Tensor, caps: list[int | None], loss: Tensor | None, driver: Driver, generator: torch.Generator | None
) -> list[Tensor]:
    """The sweep of `tensor_train` over a well-scaled tensor; ``loss`` is the allowed squared error."""
    cores: list[Tensor] = []
    left, rest, left_out = 1, t, t.new_zeros((), dtype=torch.float64)
    for k, n in enumerate(t.shape[:-1]):
        rest = rest.reshape(left * n, -1)
        basis, missed = _basis(rest, caps[k], _share(loss, left_out, len(caps) - k), driver, generator)
        rest, left_out = basis.mT @ rest, left_out + missed
        cores.append(basis.reshape(left, n, -1))
        left = basis.shape[1]
    return [*cores, rest.reshape(left, t.shape[-1], 1)]


def bond_caps(ranks: Ranks | None, tol: float | None, bonds: int) -> list[int | None]:
    """The largest rank of every bond, None for no limit."""
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}; leave it out to go by ranks alone")
    return [None] * bonds if ranks is None else list(as_list(ranks, bonds, "bond"))


def _share(loss: Tensor | None, left_out: Tensor, bonds: int) -> Tensor | None:
    """What the next of so many bonds may leave out of the squared error still allowed."""
    return None if loss is None else (loss - left_out).clamp(min=0) / bonds


def _basis(
    rows: Tensor,
    cap: int | None,
    loss: Tensor | None,
    driver: Driver = "auto",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors: at most ``cap``, and no more than leave the squared error ``loss``.

    Also the squared error, which only counts where a loss is given: a difference of energies would be too inexact.
    """
    height, width = rows.shape
    if loss is None and height <= min(width, cap or height):  # nothing is cut off
        return torch.eye(height, dtype=rows.dtype, device=rows.device), rows.new_zeros((), dtype=torch.float64)
    basis, values = leading_vectors(rows, 0, cap if loss is None else None, driver=driver, generator=generator)
    tails = values.flip(0).cumsum(0).flip(0)
    kept = len(values) if loss is None else max(1, int((tails > loss).sum()))
    kept = min(kept, cap or kept)
    return basis[:, :kept], values[kept:].sum()
