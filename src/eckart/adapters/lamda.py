"""LaMDA: a small square matrix between spectral factors, of which the outer one is frozen column by column.

    W = U diag(s) Vᵀ,   B_0 = U_r (out, r),   S_0 = diag(s_r) / c (r, r),   A = V_rᵀ (r, in)
    y = x (W + c (B S - B_0 S_0) A)ᵀ,   S trained throughout, A never, column j of B until step (j / r) η T of T

LaMDA++ gives rank r_l to layer l in proportion to 1 - E_l(r), the energy Σ s² that r components leave over.

S. Azizi, S. Kundu, M. Pedram, LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation,
EMNLP Findings 2024, arXiv 2406.12832; code: ArminAzizi98/LaMDA. The released code has no SVD (``init="lora"``: A
Kaiming uniform, B zero), and leaves the factor r out of its schedule, so that at most three columns are ever frozen.
A column that is frozen stays to the bit here; the code zeroes its gradient, and momentum and weight decay move it on.
The exact rule of LaMDA++ is not published; this one meets the budget of r a layer exactly.
Under DistributedDataParallel pass ``find_unused_parameters=True``: B leaves the reduction when it is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .coordinator import Coordinator
from .factored import FactoredAdapter, kaiming_uniform
from .pissa import Solver
from .site import Site

__all__ = ["LaMDA", "share_out"]

Initial = Literal["svd", "lora"]
Ranks = Literal["fixed", "spectrum"]


def share_out(scores: Mapping[str, float], budget: int, largest: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers in proportion to scores, each from 1 to ``largest``, with a given sum.

    Args:
        scores: At least 0, by name.
        budget: The sum, from one each to all the largest.
        largest: By name.

    Example:
        >>> share_out({"a": 1.0, "b": 3.0, "c": 0.0}, 9, {"a": 8, "b": 5, "c": 8})
        {'a': 3, 'b': 5, 'c': 1}
    """
    found = dict.fromkeys(scores, 1)
    total = sum(scores.values())
    weight = {name: score / total if total > 0 else 1 / len(scores) for name, score in scores.items()}
    # Give one at a time to whoever is furthest below its share: exact, monotone in the scores, and bounded.
    for _ in range(budget - len(found)):
        free = [name for name in found if found[name] < largest[name]]
        if not free:
            break
        found[max(free, key=lambda name: weight[name] * budget - found[name])] += 1
    return found


@dataclass(frozen=True)
class LaMDA(AdapterMethod):
    """Spectrally decomposed low-dimensional adaptation.

    Attributes:
        frozen_by: η, share of the steps after which B is frozen altogether.
        init: "svd" (the paper), or "lora" (A Kaiming uniform, B zero, S as `nn.Linear` starts; the released code).
        ranks_by: "fixed" for r everywhere, or "spectrum" for LaMDA++.
        solver: How the r leading triplets are found: "auto" (randomized where it pays, within 1 % of the best error),
            "randomized", "lanczos" (to rounding, half the time of "exact"), or "exact".

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = LaMDA().build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max()) < 1e-6
        (20, True)
    """

    frozen_by: float = 0.3
    init: Initial = "svd"
    ranks_by: Ranks = "fixed"
    solver: Solver = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.frozen_by <= 1:
            raise ValueError(f"frozen_by must be a share of the steps, above 0 and at most 1, not {self.frozen_by}")
        self.check_choices(init=Initial, ranks_by=Ranks, solver=Solver)

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """S and B trained."""
        return _LaMDAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r² + r out, before any column is frozen."""
        return rank * rank + rank * site.out_features

    def ranks(
        self,
        sites: Mapping[str, Site],
        statistics: Mapping[str, Statistics],
        rank: int,
        weight: Callable[[str], Tensor],
    ) -> dict[str, int] | None:
        """LaMDA++: more where r components leave more energy over."""
        if self.ranks_by == "fixed":
            return None
        scores: dict[str, float] = {}
        for name in sites:
            w = weight(name)
            whole = float(w.double().square().sum())
            kept = float(svd(w, rank, driver=self.solver).s.double().square().sum())
            scores[name] = max(0.0, 1 - kept / whole) if whole > 0 else 0.0
        return share_out(scores, rank * len(sites), {name: site.largest_rank for name, site in sites.items()})

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator:
        """What freezes the columns."""
        return _Freezing(self.frozen_by, adapters, seed)


class _LaMDAAdapter(FactoredAdapter):
    left: nn.Parameter

    def __init__(self, method: LaMDA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "core"), core="full", anchored=True, scale=scale)
        self.method = method

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        if self.method.init == "svd":
            top = svd(weight, self.rank, driver=self.method.solver)
            self.set_factors(left=top.u, core=torch.diag(top.s / self.scale), right=top.vh)
            return
        right, core = (kaiming_uniform(part.shape, generator) for part in (self.right, self.core))
        self.set_factors(left=torch.zeros(self.left.shape), core=core, right=right)


class _Freezing(Coordinator):
    """Holds the first columns of every B where they are."""

    def __init__(self, frozen_by: float, adapters: Mapping[str, Any], seed: int) -> None:
        super().__init__(adapters, seed)
        self.frozen_by = frozen_by
        self.members: list[_LaMDAAdapter] = list(adapters.values())
        self.state["share"] = torch.zeros((), dtype=torch.float64)  # of the columns, that are frozen
        self._held: list[Tensor] | None = None  # from a step's first forward pass to its end

    def columns(self, adapter: _LaMDAAdapter) -> int:
        """Columns of B that are frozen."""
        return math.floor(adapter.rank * float(self.state["share"]) + 1e-9)

    def before_forward(self, kwargs: dict[str, Any], training: bool) -> None:
        # Not while evaluating: a run to be resumed may be measured before its values are loaded.
        if training and self._held is None:
            self._held = [self._hold(adapter) for adapter in self.members]

    def _hold(self, adapter: _LaMDAAdapter) -> Tensor:
        """A copy of the frozen columns; where all are, nothing moves them and none is needed."""
        count = self.columns(adapter)
        if count == adapter.rank:
            adapter.left.requires_grad_(False)
            adapter.left.grad = None
            count = 0
        return adapter.left.detach()[:, :count].clone()

    def on_step(self, step: int, total: int) -> None:
        for adapter, held in zip(self.members, self._held or [], strict=False):
            adapter.left[:, : held.shape[1]] = held
        self.state["share"] = torch.tensor(min(1.0, step / (self.frozen_by * total)), dtype=torch.float64)
        self._held = None
