"""Overlap of the leading singular subspaces of the weights of one kind: do layers read and write the same directions?

    W_a = U_a S_a V_aᵀ, its k largest triplets

    left(a, b)  = ||U_aᵀ U_b||_F^2 / k      directions written,  U (m, k)
    right(a, b) = ||V_aᵀ V_b||_F^2 / k      directions read,     V (n, k)

1 for the same space, 0 for orthogonal ones, and k / m and k / n on average for random ones, which is the figure to
compare with. The triplets are exact: a randomized decomposition that is within 1 % of the best error can miss half of
a subspace where the spectrum is flat.

Reference: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, section 7.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg import svd
from ..models.finite import check_weight
from ..models.select import LinearRef, Where
from ..models.topology import kinds_of
from ..models.weights import MEMORY, map_weights, weights_of

__all__ = ["SubspaceOverlaps", "pairwise_overlaps", "subspace_overlaps", "subspace_overlaps_of"]

_LANCZOS_FROM = 1024  # shorter side from which Lanczos finds a few triplets faster than the Gram matrix does


@dataclass(frozen=True)
class SubspaceOverlaps:
    """Overlaps between the weights of one kind and shape.

    Attributes:
        kind: their name without the numbers of the blocks.
        names: of the weights, in the model's order, L of them.
        shape: (m, n) of each.
        rank: dimension k of the subspaces.
        left: (L, L) float64, overlap of the left singular subspaces of each pair.
        right: (L, L) float64, of the right ones.
    """

    kind: str
    names: tuple[str, ...]
    shape: tuple[int, int]
    rank: int
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)

    @property
    def chance(self) -> tuple[float, float]:
        """Overlap of random subspaces on average, left and right: k / m and k / n."""
        return self.rank / self.shape[0], self.rank / self.shape[1]

    def adjacent(self) -> tuple[list[float], list[float]]:
        """Overlaps of each weight with the next, left and right, L - 1 of each."""
        return self.left.diagonal(1).tolist(), self.right.diagonal(1).tolist()

    def mean(self) -> tuple[float, float]:
        """Mean over all pairs of two different weights, left and right."""
        apart = ~torch.eye(len(self.names), dtype=torch.bool)
        return float(self.left[apart].mean()), float(self.right[apart].mean())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        (left, right), (chance_left, chance_right) = self.adjacent(), self.chance
        return {
            "kind": self.kind,
            "names": list(self.names),
            "shape": list(self.shape),
            "rank": self.rank,
            "chance": {"left": chance_left, "right": chance_right},
            "adjacent": {"left": left, "right": right},
            "pairs": {"left": self.left.tolist(), "right": self.right.tolist()},
        }


def pairwise_overlaps(bases: Tensor) -> Tensor:
    """Overlap of every pair of subspaces.

        φ_ab = ||Q_aᵀ Q_b||_F^2 / k

    Args:
        bases: (L, n, k) orthonormal columns, any float dtype.

    Returns:
        (L, L) float64, symmetric, with a diagonal of ones.

    Example:
        >>> eye = torch.eye(4)
        >>> pairwise_overlaps(torch.stack([eye[:, :2], eye[:, 1:3], eye[:, 2:]])).tolist()
        [[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]]
    """
    count, _, rank = bases.shape
    columns = bases.double().movedim(0, 1).flatten(1)  # (n, L k)
    squares = (columns.mT @ columns).square_().view(count, rank, count, rank)
    return (squares.sum(dim=(1, 3)) / rank).clamp(max=1)


def subspace_overlaps(
    model: nn.Module | str | os.PathLike[str],
    rank: int = 16,
    *,
    where: Where | None = None,
    memory: float = MEMORY,
    progress: bool = True,
) -> list[SubspaceOverlaps]:
    """Overlap of the leading singular subspaces between all weights of each kind.

    One kind is worked on after the other, and of each weight only k left and right vectors are kept.

    Args:
        model: a model, or the directory of a safetensors checkpoint, as for `spectra`.
        rank: dimension k of the subspaces; that of the shorter side where it is larger.
        where: which linears, as in `eckart.models.linears`.
        memory: bytes that the weights at work may take with what is computed from them.
        progress: show a bar with the time left.

    Returns:
        One entry a kind of two or more weights, in the model's order.

    Raises:
        ValueError: rank below 1, a weight has NaN or Inf, or as for `spectra`.

    Example:
        >>> layers = [nn.Sequential(nn.Linear(6, 4)) for _ in range(2)]
        >>> layers[1].load_state_dict(layers[0].state_dict())
        <All keys matched successfully>
        >>> [found] = subspace_overlaps(nn.ModuleDict({"layers": nn.ModuleList(layers)}), rank=2, progress=False)
        >>> found.kind, [round(value, 6) for value in found.adjacent()[0]]
        ('layers', [1.0])
    """
    return subspace_overlaps_of(weights_of(model, where).linears, rank, memory=memory, progress=progress)


def subspace_overlaps_of(
    refs: list[LinearRef], rank: int = 16, *, memory: float = MEMORY, progress: bool = True
) -> list[SubspaceOverlaps]:
    """`subspace_overlaps` of weights that were selected already."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    kinds = kinds_of([ref.name for ref in refs])
    members: dict[tuple[str, tuple[int, int]], list[LinearRef]] = {}
    for ref in refs:
        members.setdefault((kinds[ref.name], ref.shape), []).append(ref)
    found = []
    for (kind, shape), group in members.items():
        if len(group) < 2:
            continue
        k = min(rank, *shape)
        bases = map_weights(partial(_bases, rank=k), group, kind, memory=memory, progress=progress)
        left, right = (pairwise_overlaps(torch.stack(side)) for side in zip(*bases, strict=True))
        found.append(SubspaceOverlaps(kind, tuple(ref.name for ref in group), shape, k, left, right))
    return found


def _bases(ref: LinearRef, rank: int) -> tuple[Tensor, Tensor]:
    weight = ref.weight.detach()
    check_weight(ref.name, weight)
    u, _, vh, _ = svd(weight, rank, driver="lanczos" if min(ref.shape) >= _LANCZOS_FROM else "gram")
    return u.cpu(), vh.mT.cpu()
