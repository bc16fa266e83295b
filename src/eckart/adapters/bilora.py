"""BiLoRA: low-rank factors learnt on one part of the training data, and their weights on another.

    Δ = c (P diag(λ) Q - P_0 diag(λ_0) Q_0),   P (out, r), λ (r,), Q (r, in)
    V = {P, Q},   E = {θ},   λ = softmax(θ), sigmoid(θ) or θ
    lower level, T_1 steps on D_1:   V <- argmin C(V, E; D_1) + γ_1 R_1(V),   R_1 = ||PᵀP - I||² + ||Q Qᵀ - I||²
    upper level, T_2 steps on D_2:   E <- argmin C(V(E), E; D_2) + γ_2 R_2(E)

R. Qiang, R. Zhang, P. Xie, BiLoRA: A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank Adaptation of
Large Pre-trained Models, 2024, arXiv 2403.13037; no code is known. Other methods bear the name too.

The levels alternate with the optimizer steps; what does not learn in a step gets no gradient, not a zero one, so that
neither momentum nor weight decay moves it. The data have to come in that order: ``eckart adapt`` sees to it, other
loops read `bilevel.alternating_order` in sequence (``train_sampling_strategy="sequential"`` in the Trainer). This is
the first-order method, V(E) taken as constant; `bilevel.hypergradient` has the second-order term, for a loop of one's
own.

P and Q start from N(0, 0.02²) and λ from 1 / r (1/2 with sigmoid), so the product at the start is taken off: P = 0
would leave λ without a gradient, λ = 0 would leave P and Q without one. R_1 is the mean over all layers with AdaLoRA's
weight; T_1, T_2, γ_1 and γ_2 are not known. R_2 is the mean entropy of λ as probabilities. With softmax the λ of a
layer sum to 1, so the size of Δ comes from alpha and from P and Q; weight decay on θ evens them out. Learning-rate
schedules count the steps of both levels. Under DistributedDataParallel pass ``find_unused_parameters=True``: in each
step one level is unused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.calibrate import Statistics
from .bilevel import Level, alternating_order, level_at, split_indices
from .contract import Adapter, AdapterMethod
from .coordinator import Coordinator
from .factored import FactoredAdapter
from .site import Site, SiteKind
from .sorsa import squared_deviation

__all__ = ["BiLoRA"]

Mixture = Literal["softmax", "sigmoid", "real"]


@dataclass(frozen=True)
class BiLoRA(AdapterMethod):
    """Bi-level low-rank adaptation, first-order.

    Attributes:
        mixture: How λ comes from θ: "softmax" (the paper's main results), "sigmoid" (nearly binary, by R_2) or "real".
        lower_steps: T_1.
        upper_steps: T_2.
        fraction: Share of the examples in D_1, the rest being D_2.
        orthogonality: γ_1, of the mean over both Gram matrices of all layers, as AdaLoRA has it.
        entropy: γ_2, of the mean entropy of λ, with sigmoid only.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = BiLoRA().build(site, rank=3, scale=1.0)
        >>> weight = torch.zeros(8, 6)
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max()) < 1e-9
        (45, True)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    mixture: Mixture = "softmax"
    lower_steps: int = 1
    upper_steps: int = 1
    fraction: float = 0.8
    orthogonality: float = 0.1
    entropy: float = 0.1

    def __post_init__(self) -> None:
        self.check_choices(mixture=Mixture)
        for name in ("lower_steps", "upper_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must be a share between 0 and 1, not {self.fraction}; the paper has 0.8")
        for name in ("orthogonality", "entropy"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, not {getattr(self, name)}")

    def level(self, step: int) -> Level:
        """What learns in the step after ``step`` steps."""
        return level_at(step, self.lower_steps, self.upper_steps)

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """P, θ and Q trained, their start remembered."""
        return _BiLoRAAdapter(self.mixture, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out + 1)."""
        return rank * (site.in_features + site.out_features + 1)

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator:
        """What lets the levels alternate."""
        return _Alternation(self, adapters, seed)

    def training_order(self, examples: int, batch: int, steps: int, seed: int) -> list[int]:
        """D_1 for the lower steps, D_2 for the upper ones."""
        parts = split_indices(examples, self.fraction, seed)
        return alternating_order(*parts, self.lower_steps, self.upper_steps, batch, steps, seed)


class _BiLoRAAdapter(FactoredAdapter):
    def __init__(self, mixture: Mixture, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "core", "right"), core="diagonal", anchored=True, scale=scale)
        self.mixture = mixture
        self.level: Level | None = None  # what learns; None for both

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        right, left = (0.02 * torch.randn(part.shape, generator=generator) for part in (self.right, self.left))
        core = torch.full((self.rank,), 1 / self.rank if self.mixture == "real" else 0.0)
        self.set_factors(left=left, core=core, right=right)

    def trained(self, level: Level) -> list[Tensor]:
        """V or E."""
        return [self.left, self.right] if level == "lower" else [self.core]

    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """λ for θ, and what does not learn as a constant."""
        left, right, core = super()._operands()
        assert core is not None
        if self.mixture == "softmax":
            core = core.view(2, -1).softmax(dim=-1).flatten()  # θ and its start
        elif self.mixture == "sigmoid":
            core = core.sigmoid()
        if self.level == "upper":
            left, right = left.detach(), right.detach()
        elif self.level == "lower":
            core = core.detach()
        return left, right, core


class _Alternation(Coordinator):
    """Says by the number of steps what learns, and has the penalty of that level."""

    def __init__(self, method: BiLoRA, adapters: Mapping[str, Any], seed: int) -> None:
        super().__init__(adapters, seed)
        self.method = method
        self.members: list[_BiLoRAAdapter] = list(adapters.values())
        self.level: Level | None = None
        self.state["step"] = torch.zeros((), dtype=torch.int64)  # steps that are done

    def before_forward(self, kwargs: dict[str, Any], training: bool) -> None:
        self.level = self.method.level(int(self.state["step"])) if training else None
        for adapter in self.members:
            adapter.level = self.level
            if self.level is not None:
                for tensor in adapter.trained("upper" if self.level == "lower" else "lower"):
                    tensor.grad = None  # zeros of the step before would let the optimizer move it

    def penalty(self) -> Tensor | None:
        terms = []
        if self.method.orthogonality and self.level != "upper":
            grams = self._mean(lambda a: [squared_deviation(a.left), squared_deviation(a.right)])
            terms.append(self.method.orthogonality * grams)
        if self.method.mixture == "sigmoid" and self.method.entropy and self.level != "lower":
            entropies = self._mean(lambda a: [(F.softplus(a.core) - a.core * a.core.sigmoid()).mean()])
            terms.append(self.method.entropy * entropies)
        return torch.stack(terms).sum() if terms else None

    def _mean(self, of: Callable[[_BiLoRAAdapter], list[Tensor]]) -> Tensor:
        with torch.autocast(self.members[0].left.device.type, enabled=False):  # as in half precision they are others
            values = [value for adapter in self.members for value in of(adapter)]
        return torch.stack([value.to(values[0].device) for value in values]).mean()

    def on_step(self, step: int, total: int) -> None:
        self.state["step"] = torch.tensor(step)
