"""LoRA: a low-rank update beside a weight that stays as it is.

    y = x (W + c B A)ᵀ,   B (out, r) from zero, A (r, in) uniform in ±1 / √in,   c = alpha / r

E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen, LoRA: Low-Rank Adaptation of Large
Language Models, ICLR 2022, arXiv 2106.09685; code: microsoft/LoRA. PEFT ships the same function, and on dense layers
that one will do. PEFT's does not know the layers of a compressed model; this one sits on them, and ``eckart convert``
makes one of PEFT's of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .factored import FactoredAdapter, kaiming_uniform
from .site import Site, SiteKind

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA(AdapterMethod):
    """Low-rank adaptation; it has no options.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = LoRA().build(site, rank=2, scale=1.0)
        >>> weight = torch.zeros(8, 6)
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (28, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """B and A trained."""
        return _LoRAAdapter(site, rank, trained=("left", "right"), scale=scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out)."""
        return rank * (site.in_features + site.out_features)


class _LoRAAdapter(FactoredAdapter):
    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        right = kaiming_uniform((self.rank, self.site.in_features), generator)
        self.set_factors(left=torch.zeros(self.site.out_features, self.rank), right=right)
