"""SoMA: train the minor part of a weight, and leave what carries its general knowledge as it is.

    W = U diag(s) Vᵀ,   B_0 = U_m diag(s_m / c)^½ (out, r),   A_0 = diag(s_m / c)^½ V_mᵀ (r, in),   m the r smallest
    y = x (W + c (B A - B_0 A_0))ᵀ,   B and A trained from B_0 and A_0

S. Yun, S. Chae, D. Lee, Y. Ro, SoMA: Singular Value Decomposed Minor Components Adaptation for Domain Generalizable
Representation Learning, CVPR 2025, arXiv 2412.04077; code: ysj9909/SoMA. MiLoRA is the same start.

Two parts of the recipe are settings of the training. The first 8 of 24 blocks stay frozen:
``layers_to_transform=list(range(8, 24))``, a field of the configuration. The weight decay is annealed: after each step
set ``group["weight_decay"]`` of the optimizer's groups to `weight_decay` below. The authors also split fused layers
into query, key and value first and train the biases of the adapted layers; both are left to the user here.

Different here: the code's default, "sora_niter_4", calls a randomized SVD that returns the principal part and so is
PiSSA. The minor part needs all triplets; by the Gram driver the smallest singular values are exact to 1e-8 of the
largest. B_0 A_0 is kept with the adapter: minor vectors of nearly equal singular values cannot be computed twice. A
component whose singular value is zero would never get a gradient, so those start at ``floor``. The layer starts as it
was in any case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .factored import FactoredAdapter
from .pissa import split_evenly
from .site import Site, SiteKind

__all__ = ["SoMA", "weight_decay"]


def weight_decay(step: int, total: int, start: float = 0.05, end: float = 1e-5) -> float:
    """Weight decay after ``step`` of ``total`` steps: half a cosine from start to end, the authors' values.

    Example:
        >>> weight_decay(0, 100), weight_decay(100, 100)
        (0.05, 1e-05)
    """
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


@dataclass(frozen=True)
class SoMA(AdapterMethod):
    """Singular value decomposed minor components adaptation.

    Attributes:
        floor: Smallest singular value that B and A start with, relative to the largest one. The default is above the
            rounding of a float32 weight and below what a weight of full rank has, so it acts on deficient ones only.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = SoMA().build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max()) < 1e-6
        (28, True)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    floor: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be from 0 to 1, a part of the largest singular value, not {self.floor}")

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """B and A trained, their start remembered."""
        return _SoMAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out)."""
        return rank * (site.in_features + site.out_features)


class _SoMAAdapter(FactoredAdapter):
    def __init__(self, method: SoMA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "right"), anchored=True, scale=scale)
        self.method = method

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        full = svd(weight, driver="gram")
        largest = torch.where(full.s[0] > 0, full.s[0], 1)  # a weight of zeros has no scale of its own
        s = full.s[-self.rank :].clamp(min=self.method.floor * float(largest))
        left, right = split_evenly(full.u[:, -self.rank :], s, full.vh[-self.rank :], self.scale)
        self.set_factors(left=left, right=right)
