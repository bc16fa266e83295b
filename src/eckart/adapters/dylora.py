"""DyLoRA: one low-rank adapter that works at every rank up to r, cut off where it is wanted after training.

    Δ_b = (alpha / b) B[:, :b] A[:b],   B (out, r) from 0, A (r, in) Kaiming uniform
    each optimizer step draws one b from 1 to r for the whole model and trains Δ_b

M. Valipour, M. Rezagholizadeh, I. Kobyzev, A. Ghodsi, DyLoRA: Parameter Efficient Tuning of Pre-trained Models using
Dynamic Search-Free Low-Rank Adaptation, EACL 2023, arXiv 2210.07558; code: huawei-noah/Efficient-NLP. The update is of
the first b components ("all") or of the b-th alone ("frozen", the loop that was released). What was not drawn does not
move here: the code leaves it to the optimizer, whose momentum and weight decay move it. The draw depends on seed and
step only, so it is the same in every process and after resuming. Evaluation and merging use rank r;
``model.base_model.truncate(b)`` leaves the adapter of rank b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .coordinator import Coordinator
from .factored import LowRankAdapter, kaiming_uniform
from .site import Site, SiteKind

__all__ = ["DyLoRA"]

Update = Literal["all", "frozen"]


@dataclass(frozen=True)
class DyLoRA(AdapterMethod):
    """Dynamic search-free low-rank adaptation.

    Attributes:
        update: What a step with rank b trains: "all" of the first b components (the paper's main form), or the b-th
            with those before it "frozen".
        smallest: Least rank that is drawn.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = DyLoRA().build(site, rank=4, scale=0.5)
        >>> adapter.initialize(torch.zeros(8, 6), None, torch.Generator().manual_seed(0))
        >>> adapter.truncate(2)
        >>> adapter.left.shape, adapter.right.shape, adapter.scale
        (torch.Size([8, 2]), torch.Size([2, 6]), 1.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    update: Update = "all"
    smallest: int = 1

    def __post_init__(self) -> None:
        self.check_choices(update=Update)
        if self.smallest < 1:
            raise ValueError(f"smallest must be a rank of at least 1, not {self.smallest}")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """B and A trained."""
        return _DyLoRAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out)."""
        return rank * (site.in_features + site.out_features)

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether there is a rank to draw."""
        problem = super().check(site, rank)
        if problem is None and rank < self.smallest:
            return f"would get rank {rank}, below smallest = {self.smallest}"
        return problem

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator:
        """What draws the ranks."""
        return _Draw(self, adapters, seed)


class _DyLoRAAdapter(LowRankAdapter):
    left: nn.Parameter
    right: nn.Parameter

    def __init__(self, method: DyLoRA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.alpha = scale * rank
        self.only_last = method.update == "frozen"
        self.drawn: int | None = None  # b of this step; None for all of r
        self.parameter("left", site.out_features, rank)  # B
        self.parameter("right", rank, site.in_features)  # A

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        self.fill(left=torch.zeros(self.left.shape), right=kaiming_uniform(self.right.shape, generator))
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        b = self.rank if self.drawn is None else min(self.drawn, self.rank)
        left, right = self.left[:, :b], self.right[:b]
        if self.drawn is not None and self.only_last:
            left = torch.cat([left[:, :-1].detach(), left[:, -1:]], dim=1)
            right = torch.cat([right[:-1].detach(), right[-1:]])
        return self.site.expand(self.site.reduce(x, right), self.alpha / b * left)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.left, self.right

    def truncate(self, rank: int) -> None:
        if rank < self.rank:
            trained = self.left.requires_grad
            self.left = nn.Parameter(self.left.detach()[:, :rank].clone(), requires_grad=trained)
            self.right = nn.Parameter(self.right.detach()[:rank].clone(), requires_grad=trained)
            self.rank = rank


class _Draw(Coordinator):
    """Draws b for each step, and puts back what the optimizer moved without being asked."""

    def __init__(self, method: DyLoRA, adapters: Mapping[str, Any], seed: int) -> None:
        super().__init__(adapters, seed)
        self.method = method
        self.members: list[_DyLoRAAdapter] = list(adapters.values())
        self.state["step"] = torch.zeros((), dtype=torch.int64)  # steps that are done
        self._before: list[tuple[Tensor, Tensor]] | None = None

    def rank_at(self, step: int) -> int:
        """b of the step after ``step`` steps."""
        largest = max(adapter.rank for adapter in self.members)
        return int(torch.randint(self.method.smallest, largest + 1, (), generator=self.generator(step)))

    def before_forward(self, kwargs: dict[str, Any], training: bool) -> None:
        drawn = self.rank_at(int(self.state["step"])) if training else None
        for adapter in self.members:
            adapter.drawn = drawn
        if training and torch.is_grad_enabled() and self._before is None:
            self._before = [(a.left.detach().clone(), a.right.detach().clone()) for a in self.members]

    def on_step(self, step: int, total: int) -> None:
        drawn = self.rank_at(int(self.state["step"]))
        for adapter, (left, right) in zip(self.members, self._before or [], strict=False):
            b = min(drawn, adapter.rank)
            still = torch.ones(adapter.rank, dtype=torch.bool, device=adapter.left.device)
            still[b - 1 if adapter.only_last else 0 : b] = False
            adapter.left[:, still] = left[:, still]
            adapter.right[still] = right[still]
        self._before = None
        self.state["step"] = torch.tensor(step)
