"""KaSA: drop the smallest singular components of a weight as noise, and learn an update in the form of an SVD.

    W_world = W - U_m diag(s_m) V_mᵀ,   m the r smallest of min(out, in) components, frozen
    y = x (W_world + c B diag(d) A)ᵀ,   B (out, r) from 0, d (r,), A (r, in), all three trained
    loss + beta Σ ||d||² + gamma Σ (||Bᵀ B - I||_F + ||A Aᵀ - I||_F), sums over adapters

F. Wang, J. Jiang, C. Park, S. Kim, J. Tang, KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models,
ICLR 2025, arXiv 2412.06071; code: juyongjiang/KaSA. PEFT has it too (``kasa_config``), with the truncation written into
the base weight and the penalties left to the user's loop.

The authors' code differs from the paper in two places, which are options here: it keeps in - r components, so that a
wide layer is truncated less or not at all (``truncation="released"``), and its penalty is of the larger Gram matrices
Aᵀ A (in, in) and B Bᵀ (out, out), which never reach I (``gram="large"``: ||Aᵀ A - I||² = ||A Aᵀ - I||² + in - r, so it
costs no more). It takes the mean of the penalties over the L adapted layers; to have that, divide beta and gamma by L.

Different here: what is dropped is a frozen term of rank r, so switching the adapter off gives the full W back. The norm
is flattened at zero as in SORSA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .factored import FactoredAdapter, kaiming_uniform
from .site import Site, SiteKind
from .sorsa import smooth_root, squared_deviation

__all__ = ["KaSA"]

Truncation = Literal["paper", "released", "none"]
Start = Literal["normal", "ones"]
Gram = Literal["small", "large"]


@dataclass(frozen=True)
class KaSA(AdapterMethod):
    """Knowledge-aware singular-value adaptation.

    Attributes:
        beta: Weight of ||d||², for each adapter. The authors' values go from 1e-4 to 1, by task.
        gamma: Weight of the orthonormality of A and B, for each adapter. The authors' values go from 1e-5 to 1.
        truncation: What is dropped: "paper" (the r smallest components), "released" (those after the first in - r, as
            the authors' code does) or "none" (the layer then starts as it was).
        start: d at the start: "normal" (standard, as in the code; it gives each component a learning rate and a sign of
            its own) or "ones".
        gram: Gram matrices of the orthonormality: "small" (r, r), or "large" as in the authors' code.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = KaSA().build(site, rank=2, scale=1.0)
        >>> weight = torch.eye(8, 6)
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().square().sum())  # two of six are dropped
        (30, 2.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d"})

    beta: float = 1e-4
    gamma: float = 1e-3
    truncation: Truncation = "paper"
    start: Start = "normal"
    gram: Gram = "small"

    def __post_init__(self) -> None:
        self.check_choices(truncation=Truncation, start=Start, gram=Gram)
        for name in ("beta", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}; 0 leaves the penalty out")

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """B, d and A trained, what is dropped frozen."""
        return _KaSAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out + 1)."""
        return rank * (site.in_features + site.out_features + 1)

    def check(self, site: Site, rank: int) -> str | None:
        """As everywhere, and something must be left of the weight."""
        problem = super().check(site, rank)
        if problem is None and self.dropped(site, rank) == site.largest_rank:
            return f"has min(out, in) = {rank} components, all of which rank {rank} would drop; choose a smaller rank"
        return problem

    def dropped(self, site: Site, rank: int) -> int:
        """How many singular components the truncation takes away."""
        if self.truncation == "released":
            return max(0, site.largest_rank - (site.in_features - rank))
        return 0 if self.truncation == "none" else rank


class _KaSAAdapter(FactoredAdapter):
    dropped_left: Tensor
    dropped_right: Tensor

    def __init__(self, method: KaSA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "core", "right"), core="diagonal", scale=scale)
        self.method = method
        self.dropped = method.dropped(site, rank)
        if self.dropped:
            self.buffer("dropped_left", site.out_features, self.dropped)
            self.buffer("dropped_right", self.dropped, site.in_features)

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        if self.dropped:
            full = svd(weight, driver="gram")  # of all triplets the last ones are exact to 1e-8 of the largest
            last = slice(-self.dropped, None)
            self.fill(dropped_left=full.u[:, last] * full.s[last], dropped_right=full.vh[last])
        right = kaiming_uniform((self.rank, self.site.in_features), generator)
        core = torch.ones(self.rank) if self.method.start == "ones" else torch.randn(self.rank, generator=generator)
        self.set_factors(left=torch.zeros(self.site.out_features, self.rank), core=core, right=right)

    def penalty(self) -> Tensor | None:
        if self.method.beta == self.method.gamma == 0:
            return None
        with torch.autocast(self.left.device.type, enabled=False):
            squares = torch.stack([squared_deviation(self.left), squared_deviation(self.right)])
            if self.method.gram == "large":
                squares = squares + squares.new_tensor([self.site.out_features, self.site.in_features]) - self.rank
            return self.method.beta * self.core.square().sum() + self.method.gamma * smooth_root(squares).sum()

    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The update and, taken off, what is dropped."""
        left, right, core = super()._operands()
        if not self.dropped:
            return left, right, core
        left, right = torch.cat([left, -self.dropped_left], dim=1), torch.cat([right, self.dropped_right])
        return left, right, torch.cat([self.core, self.core.new_ones(self.dropped)])
