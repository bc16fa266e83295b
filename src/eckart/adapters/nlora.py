"""NLoRA: a LoRA with a square matrix in the middle, started from rows and columns of the weight itself, without an SVD.

    y = x (W + c B N A)ᵀ,   B = W[:, J] (out, r),   N = W[I, J] (r, r),   A = W[I] (r, in),   I = J = 0 ... r - 1

    nlora     B, N and A trained                                                                    r (in + out) + r²
    inttune   N trained, B and A frozen                                                             r²
    slora     B, N and A trained, from B = 0 and random N and A                                     r (in + out) + r²

C. Guo, Y. Chang, Y. Wu, NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models, Findings of EMNLP 2025,
arXiv 2502.14482; code: TracyGuo2001/NLoRA. The Nyström approximation W ~ B W[I, J]⁺ A that the name refers to has the
inverse of the block for N; the authors' code takes the block itself, and so do we. It adds B N A to W and takes nothing
off, so the layer changes before the first step, by about 1 % for a Gaussian W of deviation 0.02 and width 256. Ours:
``residual``, ``choice`` of other rows and columns, and ``core``, which has the inverse too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg.cur import cur, skeleton
from ..models.calibrate import Statistics
from .contract import AdapterMethod
from .factored import FactoredAdapter, kaiming_uniform
from .site import Site, SiteKind

__all__ = ["Choice", "Middle", "NLoRA", "Variant", "choose"]

Variant = Literal["nlora", "slora", "inttune"]
Choice = Literal["leading", "leverage", "pivot"]
Middle = Literal["block", "inverse"]


def choose(weight: Tensor, rank: int, choice: Choice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows and columns of a weight.

    Args:
        weight: (out, in).
        rank: r, how many of each.
        choice: "leading": the first ones. "leverage": drawn with their leverage scores as probabilities. "pivot": those
            of a rank-revealing factorisation, filled up with the first others where the weight has a smaller rank.
        generator: Source of the draw, on the CPU.

    Returns:
        I and J, (r,) int64.
    """
    if choice == "leading" or not bool(weight.any()):
        return torch.arange(rank, device=weight.device), torch.arange(rank, device=weight.device)
    seed = int(torch.randint(2**31, (), generator=generator))
    found = cur(weight, rank, select=choice, generator=torch.Generator(weight.device).manual_seed(seed))
    return _filled(found.rows, weight.shape[0], rank), _filled(found.columns, weight.shape[1], rank)


def _filled(kept: Tensor, size: int, rank: int) -> Tensor:
    others = torch.ones(size, dtype=torch.bool, device=kept.device).index_fill_(0, kept, False).nonzero()[:, 0]
    return torch.cat([kept, others])[:rank]


@dataclass(frozen=True)
class NLoRA(AdapterMethod):
    """Nyström-initiated low-rank adaptation, with StructuredLoRA and IntTune.

    Attributes:
        variant: "nlora", "slora" or "inttune", see above.
        choice: Rows and columns: "leading" as in the paper, "leverage" (drawn by leverage scores) or "pivot"
            (rank-revealing, which makes the block well conditioned). Not for slora.
        core: N at the start: "block" W[I, J], as in the authors' code, or "inverse" W[I, J]⁺, as in Nyström's
            approximation. Then B N A has the size of W or more (for Gaussian W of width 256 and r = 32 it was 4 to 13
            times with leading rows and columns, 1.6 to 1.8 times with pivots), so ``residual`` is needed. Not for
            slora.
        residual: Take c B N A at the start off the weight, so that the layer starts as it was. Not for slora, which
            does in any case.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = NLoRA(variant="inttune", residual=True).build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (4, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    variant: Variant = "nlora"
    choice: Choice = "leading"
    core: Middle = "block"
    residual: bool = False

    def __post_init__(self) -> None:
        self.check_choices(variant=Variant, choice=Choice, core=Middle)
        if self.variant == "slora" and (self.choice, self.core, self.residual) != ("leading", "block", False):
            raise ValueError("slora starts from random factors; leave out choice, core and residual")
        if self.core == "inverse" and not self.residual:
            raise ValueError("core='inverse' adds an approximation of the weight to itself; set residual=True")

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """B, N and A, or N alone, trained."""
        return _NLoRAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out) + r²; for IntTune r²."""
        outer = 0 if self.variant == "inttune" else rank * (site.in_features + site.out_features)
        return outer + rank * rank


class _NLoRAAdapter(FactoredAdapter):
    def __init__(self, method: NLoRA, site: Site, rank: int, scale: float) -> None:
        trained = ("core",) if method.variant == "inttune" else ("left", "core", "right")
        super().__init__(site, rank, trained=trained, core="full", anchored=method.residual, scale=scale)
        self.method = method

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        if self.method.variant == "slora":
            right, core = (kaiming_uniform((self.rank, size), generator) for size in (self.site.in_features, self.rank))
            self.set_factors(left=torch.zeros(self.site.out_features, self.rank), core=core, right=right)
            return
        rows, columns = choose(weight, self.rank, self.method.choice, generator)
        core = weight[rows][:, columns]
        if self.method.core == "inverse":
            core = skeleton(weight, rows, columns, core="intersection").u
        self.set_factors(left=weight[:, columns], core=core, right=weight[rows])
