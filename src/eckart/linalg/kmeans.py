"""K-means of points of which only the inner products are known, in groups that share one number of clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import LinalgError

__all__ = ["kmeans_in_groups"]

_ROUNDS = 100


def kmeans_in_groups(
    grams: Sequence[Tensor], count: int, generator: torch.Generator, *, restarts: int = 16
) -> list[Tensor]:
    """K-means++ over several groups of points that share one number of clusters; no cluster spans two groups.

        min of  sum over clusters Q, i in Q of ||y_i - mean of Q||^2,      grams[g][i, j] = <y_i, y_j>

    Where the clusters are needed most is part of the problem: a group of near copies ends with fewer of them. Every
    group has at least one. Each start costs O(M^2 K) a round for M points; the answer is the best of the starts, a
    local minimum.

    Args:
        grams: (E_g, E_g) of each group, symmetric positive semidefinite, any float dtype; worked on in float64.
        count: K, clusters of all groups together.
        generator: of the random starts, on the CPU.
        restarts: how many of them.

    Returns:
        (E_g,) int64 of each group, on the CPU: the cluster of each point, numbered from 0 within its group in the
        order of their first points.

    Raises:
        ValueError: fewer clusters than groups, or more than points.
        LinalgError: a matrix is not square, or holds NaN or Inf.

    Example:
        >>> near = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # twice the same point
        >>> far = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> [labels.tolist() for labels in kmeans_in_groups([near, far], 3, torch.Generator().manual_seed(0))]
        [[0, 0], [0, 1]]

    Reference:
        D. Arthur and S. Vassilvitskii, k-means++: The Advantages of Careful Seeding, SODA 2007; S. Lloyd, Least squares
        quantization in PCM, IEEE Trans. Information Theory 28 (1982).
    """
    for gram in grams:
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not bool(torch.isfinite(gram).all()):
            raise LinalgError(f"K-means needs square matrices of finite inner products, got {tuple(gram.shape)}")
    points = sum(len(gram) for gram in grams)
    if not len(grams) <= count <= points:
        raise ValueError(f"{count} clusters do not fit: there must be {len(grams)} (one a group) to {points} (points)")
    gram = torch.block_diag(*(g.double().cpu() for g in grams))
    group = torch.cat([torch.full((len(g),), i) for i, g in enumerate(grams)])
    best, lowest = group, math.inf
    for _ in range(restarts):
        labels, objective = _lloyd(gram, group, _seeds(gram, group, count, generator))
        if objective < lowest - 1e-12:
            best, lowest = labels, objective
    return [torch.unique(_by_first(best[group == i]), return_inverse=True)[1] for i in range(len(grams))]


def _by_first(labels: Tensor) -> Tensor:
    """Each label replaced by the position of the first point that has it."""
    return (labels[:, None] == labels[None, :]).int().argmax(dim=1)


def _seeds(gram: Tensor, group: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count,) points to start from: one of each group, the others by squared distance to the nearest (K-means++)."""
    first = [int(torch.multinomial((group == i).double(), 1, generator=generator)) for i in range(int(group.max()) + 1)]
    square = gram.diagonal()
    distance = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0)
    distance[group[:, None] != group[None, :]] = math.inf
    seeds = first
    while len(seeds) < count:
        nearest = distance[:, seeds].min(dim=1).values
        nearest[seeds] = 0
        free = torch.ones(len(gram), dtype=torch.float64)
        free[seeds] = 0
        # Copies of points that are seeds already may be all that is left.
        weights = nearest if float(nearest.sum()) > 0 else free
        seeds = [*seeds, int(torch.multinomial(weights, 1, generator=generator))]
    return torch.tensor(seeds)


def _lloyd(gram: Tensor, group: Tensor, seeds: Tensor) -> tuple[Tensor, float]:
    """Labels (M,) and the objective once assigning and averaging change nothing any more."""
    home = group[seeds]
    means = torch.nn.functional.one_hot(seeds, len(gram)).double()  # (K, M): each row weighs the points of a mean
    labels = torch.full((len(gram),), -1)
    for _ in range(_ROUNDS):
        distance = _distances(gram, means)
        distance[group[:, None] != home[None, :]] = math.inf
        found = distance.argmin(dim=1)
        for empty in sorted(set(range(len(seeds))) - set(found.tolist())):
            # It takes the point that is worst off, in whatever group, among those that do not stand alone.
            shared = torch.bincount(found, minlength=len(seeds))[found] > 1
            worst = int(torch.where(shared, distance.gather(1, found[:, None])[:, 0], -math.inf).argmax())
            found[worst], home[empty] = empty, group[worst]
        if torch.equal(found, labels):
            break
        labels = found
        means = torch.nn.functional.one_hot(labels, len(seeds)).double().mT
        means = means / means.sum(dim=1, keepdim=True)
    return labels, float(_distances(gram, means).gather(1, labels[:, None]).sum())


def _distances(gram: Tensor, means: Tensor) -> Tensor:
    """(M, K) squared distances ||y_i - sum_j means[k, j] y_j||^2."""
    products = gram @ means.mT
    return gram.diagonal()[:, None] - 2 * products + (means * products.mT).sum(dim=1)
