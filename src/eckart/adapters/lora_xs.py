"""LoRA-XS: freeze the principal singular vectors of a weight and train only a small square matrix between them.

    W = U diag(s) Vᵀ,   B = U_r (out, r),   A = diag(s_r) V_rᵀ (r, in)
    y = x (W + c B R A)ᵀ,   only R (r, r) is trained, from N(0, 1e-5²)

K. Bałazy, M. Banaei, K. Aberer, J. Tabor, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters,
ECAI 2025, arXiv 2405.17604; code: MohammadrezaBanaei/LoRA-XS. A layer has r² trained numbers whatever its width, and
wants a learning rate 10 to 40 times LoRA's. The code runs a NumPy SVD of every full weight; here the triplets come from
the randomized driver. A and B are saved with R: an SVD is not the same to the bit on the next machine, and R means
nothing between other vectors. The code's ``half_init_dec`` (one half of B at random) is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .factored import FactoredAdapter, kaiming_uniform
from .pissa import Solver, split_evenly
from .site import Site, SiteKind

__all__ = ["Initial", "LoRAXS", "Split", "place_spectrum"]

Initial = Literal["svd", "random"]
Split = Literal["right", "left", "even", "none"]


def place_spectrum(u: Tensor, s: Tensor, vh: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """The outer factors of u diag(s) vh, with the singular values in one, in both, or in none of them.

    Args:
        u: (out, r).
        s: (r,).
        vh: (r, in).
        split: "right": u and diag(s) vh. "left": u diag(s) and vh. "even": the roots in both. "none": u and vh.

    Returns:
        left (out, r) and right (r, in).
    """
    if split == "even":
        return split_evenly(u, s, vh)
    return u * s if split == "left" else u, s[:, None] * vh if split == "right" else vh


@dataclass(frozen=True)
class LoRAXS(AdapterMethod):
    """Low-rank adaptation with an extremely small number of parameters.

    Attributes:
        init: Where A and B come from: "svd" of the weight, or "random" (Kaiming uniform, the ablation).
        split: Where the singular values go: "right" (A, as in paper and code), "left" (B), "even" (their roots in
            both) or "none". The gradient of R scales with them, direction by direction. Not for "random".
        sigma: Standard deviation of R at the start. With 0 the layer starts exactly as it was, and trains as well.
        solver: How the r leading triplets are found: "auto" (randomized where it pays, within 1 % of the best error),
            "randomized", "lanczos" (to rounding, half the time of "exact"), or "exact".

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = LoRAXS(sigma=0).build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (4, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    init: Initial = "svd"
    split: Split = "right"
    sigma: float = 1e-5
    solver: Solver = "auto"

    def __post_init__(self) -> None:
        self.check_choices(init=Initial, split=Split, solver=Solver)
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"sigma must be a number of at least 0, not {self.sigma}; the paper uses 1e-5")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """R trained between frozen B and A."""
        return _LoRAXSAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r²."""
        return rank * rank

    def start(self, weight: Tensor, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The three factors at the start: left B (out, r), core R (r, r), right A (r, in).

        Args:
            weight: (out, in).
            rank: r.
            generator: Source of R, and of random A and B.
        """
        if self.init == "svd":
            top = svd(weight, rank, driver=self.solver)
            left, right = place_spectrum(top.u, top.s, top.vh, self.split)
        else:
            right, left = (
                kaiming_uniform(shape, generator) for shape in ((rank, weight.shape[1]), (weight.shape[0], rank))
            )
        core = self.sigma * torch.randn(rank, rank, generator=generator)
        return {"left": left, "core": core, "right": right}


class _LoRAXSAdapter(FactoredAdapter):
    def __init__(self, method: LoRAXS, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("core",), core="full", scale=scale)
        self.method = method

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        self.set_factors(**self.method.start(weight, self.rank, generator))
