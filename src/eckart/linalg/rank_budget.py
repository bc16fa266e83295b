"""Two published rules that share a budget of RANKS, not of parameters, over the layers of a model.

    EVA      rank_l = number of layer l's values among the R largest s_li^2 / sum_j s_lj^2 of all layers
    WeLore   rank_l = number of values of layer l with (s_li - min s_l) / (max s_l - min s_l) >= κ,  one κ for all

``allocate`` shares parameters instead, which is what a compressed model is paid in; a rank of a wide matrix costs more
than one of a narrow matrix. EVA counts ranks because adapters are sized by rank; WeLore's published threshold is a
quantile of all normalised values, and this is that rule as published.

Reference: F. Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation" (EVA), NeurIPS 2025,
arXiv:2410.07170; A. Jaiswal et al., "From Low Rank Gradient Subspace Stabilization to Low-Rank Weights" (WeLore), ICML
2025, arXiv:2407.11239.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from .allocate import Matrix, _Problem, _welore
from .spectrum import Spectrum, descending, shares

__all__ = ["VarianceMetric", "explained_variance_ranks", "welore_ranks"]

VarianceMetric = Literal["ratio", "raw", "sum", "max"]


def explained_variance_ranks(
    spectra: Sequence[Spectrum], budget: int, rho: float = 2.0, *, metric: VarianceMetric = "ratio"
) -> list[int]:
    """Gives ranks to the layers whose inputs have the largest explained variances (EVA).

        cap = rho * budget / L,   the ``budget`` largest of { metric(s_li) : i <= cap } over all L layers are kept

    Each layer keeps its leading directions, so sum of ranks = ``budget``. Ties go to the layer named first. Where
    layers share one input (query, key and value), give its spectrum once for each of them. Explained variance is no
    loss: a layer whose input has one large direction and a long tail gets few ranks.

    Args:
        spectra: For each layer the singular values of its centred inputs, in any order.
        budget: Ranks in all: the base rank times the number of layers.
        rho: How many times the base rank a layer may get, at least 1; 1 makes the ranks uniform. 1 or 2 in the paper.
        metric: "ratio": s_i^2 / sum s_j^2, the paper's. "raw": s_i^2. "sum": as "ratio", the sum over the first
            ``cap`` only. "max": s_i^2 / s_1^2.

    Returns:
        One rank for each layer, between 0 and ``cap`` (rounded, at least the even share).

    Raises:
        ValueError: rho below 1, unknown metric, or a budget below 0 or above the number of values within the caps.
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> flat, steep = [1.0, 1.0, 1.0, 1.0], [8.0, 1.0, 0.5, 0.25]
        >>> explained_variance_ranks([flat, steep], budget=4, rho=2)
        [3, 1]
        >>> explained_variance_ranks([flat, steep], budget=4, rho=1)
        [2, 2]
    """
    if metric not in get_args(VarianceMetric):
        raise ValueError(f"metric must be one of {', '.join(get_args(VarianceMetric))}, not {metric!r}")
    if not 1 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number of at least 1, not {rho}; 1 makes the ranks uniform")
    layers = [descending(s, f"spectra[{index}]") for index, s in enumerate(spectra)]
    share = budget / len(layers) if layers else 0.0
    cap = max(round(rho * share), math.ceil(share))
    room = sum(min(s.numel(), cap) for s in layers)
    if not 0 <= budget <= room:
        raise ValueError(f"budget must be between 0 and {room}, the values within {cap} a layer, not {budget}")
    scores = []
    for s in layers:
        if metric == "raw":
            scores.append(s[:cap])  # the squares have the same order, and cannot overflow
        else:
            score = shares(s[:cap] if metric == "sum" else s)
            scores.append(score[:cap] / score[0] if metric == "max" and s[0] > 0 else score[:cap])
    owner = torch.cat([torch.full_like(s, index) for index, s in enumerate(scores)]) if scores else torch.zeros(0)
    best = torch.cat(scores).argsort(descending=True, stable=True)[:budget] if scores else torch.zeros(0).long()
    return torch.bincount(owner[best].long(), minlength=len(layers)).tolist()


class _RankBudget(_Problem):
    """WeLore's problem with every rank at the same price and no dense fallback."""

    def admissible(self, wishes: Sequence[int]) -> list[int]:
        return [min(max(wish, self.minimum), *matrix.shape) for matrix, wish in zip(self.matrices, wishes, strict=True)]

    def cost(self, ranks: Sequence[int]) -> int:
        return sum(ranks)


def welore_ranks(spectra: Sequence[Spectrum], reduction: float, *, minimum: int = 1) -> list[int]:
    """Cuts the layers at one threshold on their singular values, each layer's scaled to [0, 1] (WeLore).

        rank_l = #{ i : (s_li - min s_l) / (max s_l - min s_l) >= κ },   κ the smallest with
        sum_l rank_l <= (1 - reduction) * sum_l n_l

    The published search over κ in steps of 0.005 becomes exact: κ is one of the values. One outlier in a spectrum
    pushes all its other values below κ, so ``minimum`` matters. ``allocate(policy="welore")`` is the same rule under a
    budget of parameters.

    Args:
        spectra: For each layer its n_l singular values, all of them, in any order.
        reduction: Fraction of the ranks removed (the paper's effective rank reduction), in [0, 1).
        minimum: Smallest rank of a layer, at least 1.

    Returns:
        One rank for each layer. Fewer ranks than the budget where values tie at the threshold; more only where
        ``minimum`` needs more than the budget.

    Raises:
        ValueError: reduction outside [0, 1), minimum below 1.
        LinalgError: Not one-dimensional, or a value is NaN, infinite or negative.

    Example:
        >>> welore_ranks([[4.0, 3.0, 2.0, 1.0], [9.0, 2.0, 1.5, 1.0]], reduction=0.5)
        [3, 1]
    """
    if not 0 <= reduction < 1:
        raise ValueError(f"reduction is the fraction of the ranks removed, from 0 to below 1, not {reduction}")
    if minimum < 1:
        raise ValueError(f"minimum must be at least 1, not {minimum}")
    layers = [descending(s, f"spectra[{index}]") for index, s in enumerate(spectra)]
    if not layers:
        return []
    matrices = [Matrix(str(index), (s.numel(), s.numel()), s) for index, s in enumerate(layers)]
    total = sum(s.numel() for s in layers)
    problem = _RankBudget(matrices, math.floor((1 - reduction) * total), "plain", minimum)
    problem.budget = max(problem.budget, problem.cost(problem.least()))
    return _welore(problem)
