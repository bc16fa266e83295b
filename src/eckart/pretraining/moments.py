"""Means and centred second moments of inputs and targets, of a stream of batches in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["JointMoments", "joint_moments"]


@dataclass(frozen=True)
class JointMoments:
    """Sums over N rows, float64.

    Attributes:
        count: N.
        x_mean: (p,).
        y_mean: (q,).
        xx: (p, p), (X - x̄)ᵀ (X - x̄).
        xy: (p, q), (X - x̄)ᵀ (Y - ȳ).
        yy: ||Y - ȳ||_F².
    """

    count: int
    x_mean: Tensor
    y_mean: Tensor
    xx: Tensor
    xy: Tensor
    yy: float


def joint_moments(batches: Iterable[tuple[Tensor, Tensor]]) -> JointMoments:
    """Gathers them batch by batch.

    Each batch is centred by itself, and two sets of sums are merged by Chan's rule, which loses no digits where means
    are large against deviations: S = S_a + S_b + (n_a n_b / n) d dᵀ with d the difference of the means.

    Args:
        batches: Pairs of rows (N_i, p) and (N_i, q), any float dtype.

    Raises:
        ValueError: No rows, widths that change, NaN or Inf; with the number of the batch.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> found = joint_moments([(x, 2 * x), (x + 2, 2 * x)])
        >>> found.x_mean.tolist(), found.xx.tolist(), found.xy.tolist()
        ([3.0], [[8.0]], [[8.0]])
    """
    total: JointMoments | None = None
    for number, (x, y) in enumerate(batches):
        _check(number, x, y, total)
        if not len(x):
            continue
        x, y = x.detach().double(), y.detach().to(x.device, torch.float64)
        x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
        x, y = x - x_mean, y - y_mean
        one = JointMoments(len(x), x_mean, y_mean, x.mT @ x, x.mT @ y, float(y.square().sum()))
        total = one if total is None else _merged(total, one)
    if total is None:
        raise ValueError("there are no rows of inputs and targets to initialise from")
    return total


def _merged(a: JointMoments, b: JointMoments) -> JointMoments:
    count = a.count + b.count
    x, y = b.x_mean.to(a.x_mean.device) - a.x_mean, b.y_mean.to(a.y_mean.device) - a.y_mean
    weight = a.count * b.count / count
    return JointMoments(
        count,
        a.x_mean + x * (b.count / count),
        a.y_mean + y * (b.count / count),
        a.xx + b.xx.to(a.xx.device) + weight * torch.outer(x, x),
        a.xy + b.xy.to(a.xy.device) + weight * torch.outer(x, y),
        a.yy + b.yy + weight * float(y.square().sum()),
    )


def _check(number: int, x: Tensor, y: Tensor, total: JointMoments | None) -> None:
    where = f"batch {number}" if number else "the data"
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"{where} has inputs {tuple(x.shape)} and targets {tuple(y.shape)}; give as many rows of each, (N, p) and "
            "(N, q), and classes as torch.nn.functional.one_hot"
        )
    if total is not None and (x.shape[1], y.shape[1]) != tuple(total.xy.shape):
        raise ValueError(f"{where} has other widths than those before it: {tuple(x.shape)}, {tuple(y.shape)}")
    for name, tensor in (("inputs", x), ("targets", y)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"the {name} of {where} have NaN or Inf; leave those rows out")
