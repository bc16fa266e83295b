"""SVFit: train the largest singular values of a weight; its singular vectors and the rest of it stay.

    W = U diag(s) Vᵀ,   y = x (W + c U_r diag(z - s_r) V_rᵀ)ᵀ,   U_r (out, r), V_r (in, r);   z (r,) trained from s_r

C. Sun, J. Wei, Y. Wu, Y. Shi, S. He, Z. Ma, N. Xie, Y. Yang, SVFit: Parameter-Efficient Fine-Tuning of Large
Pre-Trained Models Using Singular Values, 2024, arXiv 2409.05926; no official code. A layer has r trained numbers
whatever its width, so r can be large, and wants a learning rate far above LoRA's.

Different here: the paper splits W into its principal part and a residual; the base stays whole and the change is added,
the same function and gradient. The paper's r is to hold more than 99 % of the information: ``energy=0.99``, which on
the flat spectra of transformers is close to min(out, in). U_r and V_r, r (in + out) frozen numbers, are saved with z,
which means nothing between other vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import energy_rank, singular_values, svd
from ..models.calibrate import Statistics
from ..models.parallel import parallel_map
from .contract import AdapterMethod
from .factored import FactoredAdapter
from .pissa import Solver
from .site import Site, SiteKind

__all__ = ["SVFit", "SingularValueAdapter", "Trained"]

Trained = Literal["value", "shift", "multiplier"]


@dataclass(frozen=True)
class SVFit(AdapterMethod):
    """Fine-tuning by singular values.

    Attributes:
        energy: Where given, every layer gets the smallest rank whose singular values hold this share of its squared
            Frobenius norm, in place of the configuration's rank; the paper's is 0.99. What a layer holds in the end is
            the ``energy`` of its adapter.
        trained: The numbers that the optimizer sees: "value" z, as in the paper; "shift" z - s_r; "multiplier"
            z / s_r - 1. The start is the same. Weight decay pulls z to 0 with "value", and to s_r with the others. A
            step is as large in every direction with the first two, and in proportion to s with the third.
        solver: How the r leading triplets are found: "auto" (randomized where it pays, within 1 % of the best error),
            "randomized", "lanczos" (to rounding, half the time of "exact"), or "exact".

    Example:
        >>> site = Site("layer", "linear", 4, 4)
        >>> adapter = SVFit().build(site, rank=2, scale=1.0)
        >>> adapter.initialize(torch.diag(torch.tensor([1.0, 4.0, 3.0, 1.0])), None, torch.Generator())
        >>> adapter.core.tolist(), adapter.num_trainable(), round(float(adapter.energy), 4)  # 25 of 27
        ([4.0, 3.0], 2, 0.9259)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    energy: float | None = None
    trained: Trained = "value"
    solver: Solver = "auto"

    def __post_init__(self) -> None:
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy is a share of the squared norm, above 0 and at most 1, not {self.energy}")
        self.check_choices(trained=Trained, solver=Solver)

    def build(self, site: Site, rank: int, scale: float) -> SingularValueAdapter:
        """z trained between frozen singular vectors."""
        return SingularValueAdapter(site, rank, scale, trained=self.trained, solver=self.solver)

    def trainable(self, site: Site, rank: int) -> int:
        """r."""
        return rank

    def check(self, site: Site, rank: int) -> str | None:
        """The configuration's rank need not fit where ``energy`` takes its place."""
        return super().check(site, rank if self.energy is None else min(rank, site.largest_rank))

    def ranks(
        self,
        sites: Mapping[str, Site],
        statistics: Mapping[str, Statistics],
        rank: int,
        weight: Callable[[str], Tensor],
    ) -> dict[str, int] | None:
        """The ranks that hold ``energy``, at least 1."""
        if self.energy is None:
            return None
        energy, names = self.energy, list(sites)

        def wanted(name: str) -> int:
            return max(1, energy_rank(singular_values(weight(name)).cpu(), energy))

        found = parallel_map(wanted, names, cost=lambda name: float(sites[name].largest_rank) ** 3)
        return dict(zip(names, found, strict=True))


class SingularValueAdapter(FactoredAdapter):
    """Δ = c U_r diag(z - s_r) V_rᵀ with z trained.

    Attributes:
        energy: Share of the squared Frobenius norm of the weight that is in the trained triplets, () float32.
    """

    energy: Tensor

    def __init__(self, site: Site, rank: int, scale: float, *, trained: Trained, solver: Solver) -> None:
        super().__init__(site, rank, trained=("core",), core="diagonal", anchored=trained == "value", scale=scale)
        self.trained, self.solver = trained, solver
        self.buffer("energy")

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        """Fill in the leading triplets."""
        top = svd(weight, self.rank, driver=self.solver)
        core = top.s if self.trained == "value" else torch.zeros_like(top.s)
        self.set_factors(left=top.u * top.s if self.trained == "multiplier" else top.u, core=core, right=top.vh)
        inside, outside = top.s.double().square().sum(), top.error.square()
        self.fill(energy=inside / (inside + outside) if inside > 0 else torch.ones(()))
