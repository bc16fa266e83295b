"""PiSSA: train the principal part of a weight, leave the rest as it is.

    W = U diag(s) Vᵀ,   B_0 = U_r diag(s_r / c)^½ (out, r),   A_0 = diag(s_r / c)^½ V_rᵀ (r, in)
    y = x (W + c (B A - B_0 A_0))ᵀ,   B and A trained from B_0 and A_0

F. Meng, Z. Wang, M. Zhang, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models,
NeurIPS 2024, arXiv 2404.02948; code: GraphPKU/PiSSA. PEFT has it too (``init_lora_weights="pissa"``), by a full SVD,
and writes the residual W - c B_0 A_0 into the base weight. Here the base stays as it is, so several adapters compose
and the start is exact in bfloat16; the top of the SVD comes from the randomized driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .factored import FactoredAdapter
from .site import Site, SiteKind

__all__ = ["PiSSA", "split_evenly"]

Solver = Literal["auto", "exact", "lanczos", "randomized"]


def split_evenly(u: Tensor, s: Tensor, vh: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two factors of u diag(s) vh / scale, each with the root of the singular values.

    Args:
        u: (out, r).
        s: (r,).
        vh: (r, in).
        scale: c.

    Returns:
        left (out, r) and right (r, in).
    """
    root = (s.clamp(min=0) / scale).sqrt()
    return u * root, root[:, None] * vh


@dataclass(frozen=True)
class PiSSA(AdapterMethod):
    """Principal singular values and vectors adaptation.

    Attributes:
        solver: How the r leading triplets are found: "auto" (randomized where it pays, within 1 % of the best error),
            "randomized", "lanczos" (to rounding, half the time of "exact"), or "exact". The start is exact with any of
            them: only the split differs.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = PiSSA().build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), float(adapter.delta(weight).abs().max()) < 1e-6
        (28, True)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    solver: Solver = "auto"

    def __post_init__(self) -> None:
        self.check_choices(solver=Solver)

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """B and A trained, their start remembered."""
        return _PiSSAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out)."""
        return rank * (site.in_features + site.out_features)


class _PiSSAAdapter(FactoredAdapter):
    def __init__(self, method: PiSSA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "right"), anchored=True, scale=scale)
        self.method = method

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        top = svd(weight, self.rank, driver=self.method.solver)
        left, right = split_evenly(top.u, top.s, top.vh, self.scale)
        self.set_factors(left=left, right=right)
