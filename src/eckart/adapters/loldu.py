"""LoLDU: factor a weight by elimination, freeze the factors, and train r entries of the diagonal.

    W = P L diag(D) U,   P (out, out) permutation, L (out, k) unit lower, U (k, in) unit upper trapezoidal
    y = x (W + c P L_r diag(z - D_r) U_r)ᵀ,   z (r,) trained from D_r;   L_r, D_r, U_r the first r steps

The first r in the order of the pivots, which is the order of the columns: they are not the best r terms of W.

Y. Shi, J. Wei, Y. Wu, R. Ran, C. Sun, S. He, Y. Yang, LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition
for Parameter-Efficient Fine-Tuning, 2024, arXiv 2410.13618; code: SKDDJ/LoLDU.

Different here: the permutation is in the rows of L in place of a dense P, r steps of elimination do in place of all,
and the weight is not rebuilt in the forward pass. The code divides the rows of U by pivots that may be tiny or zero:
here such a row keeps its length and its entry is trained as a multiplier of the pivot, d = z / D, the same function
without the division. Convolutions are flattened to (out, in * kernel), where the code factors every kernel position by
itself. The code's default is c = 1 / r, which divides the gradient by r as well; c = 1 here unless α is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg.ldu import ldu
from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .factored import FactoredAdapter
from .site import Site, SiteKind

__all__ = ["LoLDU", "initial_diagonal"]

Init = Literal["lu", "uniform", "s_uniform", "normal", "s_normal", "constant", "ones", "zeros"]
Trained = Literal["diagonal", "multiplier"]

# Entries of U above this mean a pivot too small to divide by. Those of a random matrix are of order 1.
_LARGEST = 1e3


def initial_diagonal(diagonal: Tensor, init: Init, generator: torch.Generator) -> Tensor:
    """Where z (r,) starts, given D_r (r,); ``generator`` is on the CPU. See `LoLDU` for the names."""
    mean = diagonal.mean()
    if init == "lu":
        return diagonal.clone()
    if init in ("uniform", "s_uniform"):
        drawn = 2 * torch.rand(diagonal.shape, generator=generator).to(diagonal) - 1
        return drawn * mean / 2 if init == "uniform" else drawn
    if init in ("normal", "s_normal"):
        drawn = torch.randn(diagonal.shape, generator=generator).to(diagonal)
        return mean + drawn * diagonal.std(correction=min(1, diagonal.numel() - 1)) if init == "normal" else drawn
    return torch.full_like(diagonal, {"constant": float(mean), "ones": 1.0, "zeros": 0.0}[init])


@dataclass(frozen=True)
class LoLDU(AdapterMethod):
    """Low-rank adaptation by lower-diagonal-upper factors.

    Attributes:
        init: Where z starts: "lu" at D_r, the only one that leaves the model as it was; "uniform" within half the mean
            of D_r, "s_uniform" within 1, "normal" with the mean and deviation of D_r, "s_normal" with 0 and 1,
            "constant" at the mean, "ones" or "zeros".
        trained: "diagonal": z as in the paper, except for pivots more than a thousand times smaller than their row.
            "multiplier": d = z / D for every pivot but zero, which makes the gradient free of the pivot's scale.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = LoLDU().build(site, rank=3, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (3, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    init: Init = "lu"
    trained: Trained = "diagonal"

    def __post_init__(self) -> None:
        self.check_choices(init=Init, trained=Trained)

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """The diagonal trained, its start remembered."""
        return _LoLDUAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r."""
        return rank


class _LoLDUAdapter(FactoredAdapter):
    def __init__(self, method: LoLDU, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("core",), core="diagonal", anchored=True, scale=scale)
        self.method = method

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        factors = ldu(weight, self.rank)
        left, right = torch.empty_like(factors.lower), torch.empty_like(factors.upper)
        left[factors.rows] = factors.lower
        right[:, factors.columns] = factors.upper
        pivots = factors.diagonal
        as_multiplier = right.abs().amax(dim=1) > (_LARGEST if self.method.trained == "diagonal" else 0)
        unit = torch.where(as_multiplier & (pivots != 0), pivots, 1)  # what one unit of the trained entry is worth
        self.set_factors(left=left, core=pivots / unit, right=right * unit[:, None])
        self.fill(core=initial_diagonal(pivots, self.method.init, generator) / unit)
