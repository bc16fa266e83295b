"""WeLoRe: plain SVD with one threshold for all layers on singular values scaled to [0, 1], then train the factors only.

    ŝ_i = (s_i - min s) / (max s - min s),   rank = #{ŝ_i >= κ},   κ the same for every weight W (m, n)
    W ≈ U_k √S_k  √S_k V_k^T = up (m, k) down (k, n);   a weight that keeps most of its ranks stays dense

A. Jaiswal, L. Yin, Z. Zhang, S. Liu, J. Zhao, Y. Tian, Z. Wang, From GaLore to WeLore: How Low-Rank Weights
Non-uniformly Emerge from Low-Rank Gradients, 2024, arXiv 2407.11239 (ICML 2025: From Low Rank Gradient
Subspace Stabilization to Low-Rank Weights); code: VITA-Group/WeLore. What differs: κ is found exactly
instead of in steps of 0.005, and meets a budget of PARAMETERS (`eckart.linalg.allocate`, policy
"welore"), for a square matrix of half the rank in plain factors saves nothing; layers that stay dense are
counted as such, so the budget is met all the same; biases are kept. κ by the published budget of ranks
is `kappa_for`. The second half, training the factors and norms alone, is `eckart.optim.factor_groups`. A
model of which half of the ranks are gone is broken until it has been trained so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import Factors, WeightMethod
from .policies import Policy

__all__ = ["WeLoRe", "kappa_for", "normalised", "rank_at"]


def normalised(s: torch.Tensor) -> torch.Tensor:
    """(s - min s) / (max s - min s) in float64; ones for a flat spectrum, which has nothing to cut, zeros for zeros.

    Example:
        >>> normalised(torch.tensor([5.0, 2.0, 1.0])).tolist()
        [1.0, 0.25, 0.0]
    """
    s = s.double()
    width = s.max() - s.min()
    return (s - s.min()) / width if bool(width > 0) else (s > 0).double()


def rank_at(s: torch.Tensor, kappa: float, *, minimum: int = 1, maximum: int | None = None) -> int:
    """Number of normalised singular values that are at least κ, within limits.

    Args:
        s: (n,) all singular values of one weight.
        kappa: κ; 0 keeps all, above 1 leaves ``minimum``.
        minimum: smallest rank.
        maximum: largest rank, or None.

    Example:
        >>> s = torch.tensor([5.0, 2.0, 1.0])
        >>> rank_at(s, 0.0), rank_at(s, 0.1), rank_at(s, 2.0)
        (3, 2, 1)
    """
    kept = max(int((normalised(s) >= kappa).sum()), minimum)
    return kept if maximum is None else min(kept, maximum)


def kappa_for(spectra: Sequence[torch.Tensor], reduction: float) -> float:
    """The smallest κ that prunes at least this fraction of all ranks: a quantile of the pooled normalised values.

    Args:
        spectra: all singular values of each weight.
        reduction: the paper's effective rank reduction, in [0, 1).

    Example:
        >>> kappa_for([torch.tensor([5.0, 2.0, 1.0]), torch.tensor([9.0, 4.0, 1.0])], 0.5)
        0.375
    """
    if not 0 <= reduction < 1:
        raise ValueError(f"reduction is the fraction of ranks removed, from 0 to below 1, not {reduction}")
    pooled = torch.cat([normalised(s) for s in spectra]).sort().values
    # The margin is for products such as 0.7 * 10, which exceed their whole number by rounding.
    pruned = math.ceil(reduction * len(pooled) - 1e-9)
    if pruned == 0:
        return 0.0
    above = pooled[pooled > pooled[pruned - 1]]
    return float(above[0]) if len(above) else math.inf


@dataclass(frozen=True)
class WeLoRe(WeightMethod):
    """Truncated SVD of each weight, with ranks by one threshold for all of them.

    Attributes:
        min_ratio: a weight of which no more than this fraction of the ranks would be cut stays dense; 0 as for
            compression alone, 0.4999 in the paper before training the factors.
        min_rank: smallest rank of a factored weight: one outlier among the singular values pushes all others under κ.
        max_rank: largest rank of a weight, or None; such a weight never stays dense.

    Example:
        >>> weight = torch.diag(torch.tensor([4.0, 1.0, 0.5]))
        >>> factors = WeLoRe().factorize(weight, Statistics(), rank=1)
        >>> factors.up.abs().max(), factors.down.abs().max()  # the singular value is split evenly
        (tensor(2.), tensor(2.))
    """

    allocation: ClassVar[Policy] = "welore"

    min_ratio: float = 0.0
    min_rank: int = 1
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_ratio < 1:
            raise ValueError(f"min_ratio is a fraction of the ranks, from 0 to below 1, not {self.min_ratio}")
        for name, least in (("min_rank", 1), ("max_rank", self.min_rank)):
            value = getattr(self, name)
            if name == "max_rank" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")

    @property
    def limits(self) -> dict[str, Any]:
        """The options as arguments of `eckart.linalg.allocate`."""
        return {"minimum": self.min_rank, "maximum": self.max_rank, "dense_from": 1 - self.min_ratio}

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """None: every input direction counts the same."""
        return None

    def factorize(self, weight: torch.Tensor, statistics: Statistics, rank: int) -> Factors:
        """up = U_k √S_k and down = √S_k V_k^T of ``weight`` (m, n).

        Raises:
            ValueError: the options do not allow this rank, which a budget in ranks or energy may ask for.
        """
        size = min(weight.shape)
        least, most = min(self.min_rank, size), self.max_rank or size
        if not least <= rank <= most or (self.min_ratio and size - rank <= self.min_ratio * size):
            raise ValueError(
                f"rank {rank} of {size} is not within min_ratio, min_rank and max_rank; give a budget as ratio or bytes"
            )
        found = svd(weight, rank, driver="exact")
        root = found.s.sqrt()
        return Factors(found.u * root, root[:, None] * found.vh)
