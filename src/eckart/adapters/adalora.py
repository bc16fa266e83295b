"""AdaLoRA: low-rank adaptation whose rank budget moves to the layers that need it while training.

    Δ = c P diag(λ) Q,   P (out, r), λ (r,), Q (r, in);   P and Q from N(0, 0.02²), λ from 0
    I = |w ∂L/∂w|,   Ī <- β₁ Ī + (1 - β₁) I,   Ū <- β₂ Ū + (1 - β₂) |I - Ī|,   score s(w) = Ī Ū
    S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)

Of all triplets of all layers the b(t) with the largest S keep their λ, the others have it set to zero; b(t) falls by
a cubic from the start to the end budget. The loss gets γ times the mean of ||PᵀP - I||² and ||QQᵀ - I||² of all layers.

Q. Zhang, M. Chen, A. Bukharin, N. Karampatziakis, P. He, Y. Cheng, W. Chen, T. Zhao, AdaLoRA: Adaptive Budget
Allocation for Parameter-Efficient Fine-Tuning, ICLR 2023, arXiv 2303.10512; code: QingruZhang/AdaLoRA. PEFT has it as
``AdaLoraConfig``, with norms that are not squared (``squared=False`` here) and a call that the training loop must make
between backward and step. Here exactly b(t) triplets stay, also where scores are equal; the code and PEFT drop all that
are not above a threshold, which at the first masks, when many scores are zero, can take whole layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg import Importance, all_finite, most_important, triplet_importance, update_importance
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .coordinator import Coordinator
from .factored import FactoredAdapter
from .site import Site

__all__ = ["AdaLoRA", "budget"]


def budget(step: int, total: int, first: int, last: int, begin: int, end: int) -> int:
    """Triplets that are kept after a step: ``first``, then falling by a cubic, then ``last``.

    Args:
        step: t, from 1.
        total: T.
        first: b_0.
        last: b_T.
        begin: t_i, steps at the first budget.
        end: t_f, steps at the last budget.

    Example:
        >>> [budget(t, 10, first=12, last=4, begin=2, end=3) for t in range(1, 11)]
        [12, 12, 8, 5, 4, 4, 4, 4, 4, 4]
    """
    if step >= total - end:  # also where begin, rounded to steps, reaches the end
        return last
    if step <= begin:
        return first
    left = 1 - (step - begin) / (total - begin - end)
    return int(last + (first - last) * left**3)


@dataclass(frozen=True)
class AdaLoRA(AdapterMethod):
    """Adaptive budget allocation.

    Attributes:
        target: Mean rank at the end, as a share of the rank r at the start; the paper starts at 1.5 times the end.
        begin: Share of the steps at the full budget, t_i / T.
        end: Share of the steps at the end budget, when the ranks are settled, t_f / T.
        every: Steps between two masks, ΔT. The paper has 1 to 100.
        beta1: Of the mean of the sensitivity.
        beta2: Of the mean of its deviation.
        orthogonality: γ.
        squared: Whether the penalty squares the norms (the paper) or not (the code and PEFT).

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = AdaLoRA().build(site, rank=3, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (45, 0.0)
    """

    target: float = 2 / 3
    begin: float = 0.1
    end: float = 0.3
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    squared: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target must be a share of the rank, above 0 and at most 1, not {self.target}")
        if not (self.begin >= 0 and self.end > 0 and self.begin + self.end <= 1):
            raise ValueError(f"begin and end must be shares with a sum of at most 1, not {self.begin} and {self.end}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, not {self.every}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if not 0 <= self.orthogonality < math.inf:
            raise ValueError(f"orthogonality must be a number of at least 0, not {self.orthogonality}")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """P, λ and Q trained."""
        return _AdaLoRAAdapter(site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out + 1), before any triplet is dropped."""
        return rank * (site.in_features + site.out_features + 1)

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator:
        """What shares the budget out."""
        return _Budget(self, adapters, seed)


class _AdaLoRAAdapter(FactoredAdapter):
    kept: Tensor

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "core", "right"), core="diagonal", scale=scale)
        self.buffer("kept", rank)  # 1 for the triplets that have a share of the budget

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        right, left = (0.02 * torch.randn(shape, generator=generator) for shape in (self.right.shape, self.left.shape))
        self.set_factors(left=left, core=torch.zeros(self.rank), right=right)
        self.fill(kept=torch.ones(self.rank))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Factors of what is kept, and of what the optimizer has moved off zero since the last mask."""
        left, right = super().low_rank()
        live = (self.kept > 0) | (self.core != 0)
        return left[:, live], right[live]

    def settled_rank(self) -> int:
        """Triplets that have a share of the budget."""
        return int(self.kept.sum())


class _Budget(Coordinator):
    """Scores of all trained entries, and the masks that follow from them."""

    def __init__(self, method: AdaLoRA, adapters: Mapping[str, Any], seed: int) -> None:
        super().__init__(adapters, seed)
        self.method = method
        self.members: dict[str, _AdaLoRAAdapter] = dict(adapters)

    def penalty(self) -> Tensor | None:
        if not self.method.orthogonality:
            return None
        terms = []
        for adapter in self.members.values():
            for gram in (adapter.left.mT @ adapter.left, adapter.right @ adapter.right.mT):
                off = gram - torch.eye(adapter.rank, device=gram.device)
                # The root of a sum has no gradient at zero, this norm has.
                terms.append(off.square().sum() if self.method.squared else torch.linalg.vector_norm(off))
        device = terms[0].device
        return self.method.orthogonality * torch.stack([term.to(device) for term in terms]).mean()

    def on_step(self, step: int, total: int) -> None:
        method = self.method
        begin, end = round(method.begin * total), max(1, round(method.end * total))
        if step < total - end:  # then the scores are settled, and with them the masks
            for name, adapter in self.members.items():
                for part, parameter in adapter.named_parameters():
                    self._update(f"{name}.{part}", parameter)
        first = sum(adapter.rank for adapter in self.members.values())
        keep = budget(step, total, first, max(1, round(method.target * first)), begin, end)
        if keep < first and (step % method.every == 0 or step >= total - end):
            masked = sum(adapter.settled_rank() for adapter in self.members.values())
            self._mask(keep, settled=step > total - end and masked == keep)

    def _update(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or not all_finite(gradient):  # not finite: a step that mixed precision skips
            return
        new = update_importance(
            self.importance(name),
            parameter.cpu(),
            gradient.cpu(),
            beta1=self.method.beta1,
            beta2=self.method.beta2,
        )
        self.state[f"{name}.mean"], self.state[f"{name}.spread"] = new

    def importance(self, name: str) -> Importance | None:
        """Of the entries of one tensor; None before its first gradient."""
        mean = self.state.get(f"{name}.mean")
        return None if mean is None else Importance(mean, self.state[f"{name}.spread"])

    def scores(self, name: str) -> Tensor:
        """S (r,) of one layer."""
        adapter = self.members[name]

        def score(part: str) -> Tensor:
            found = self.importance(f"{name}.{part}")
            return torch.zeros(getattr(adapter, part).shape) if found is None else found.score

        return triplet_importance(score("core"), score("left"), score("right"))

    def _mask(self, keep: int, settled: bool) -> None:
        if not settled:
            kept = most_important([self.scores(name) for name in self.members], keep)
            for adapter, part in zip(self.members.values(), kept, strict=True):
                adapter.kept.copy_(part)
        for adapter in self.members.values():
            adapter.core.mul_(adapter.kept)
