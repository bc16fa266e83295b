"""What a compression method is: from a weight and its statistics to two factors.

A method file holds a frozen dataclass derived from `WeightMethod`. The runner does the rest: choosing
ranks under a budget, gathering statistics, replacing layers, checking and saving.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..linalg.weighted import weighted_svd
from ..models.calibrate import SEQUENTIAL, Statistics
from ..options import Options

__all__ = ["Factors", "WeightMethod"]


@dataclass(frozen=True)
class Factors:
    """W (m, n) is about up @ down, most important direction first.

    Attributes:
        up: (m, k).
        down: (k, n). Dropping the last columns of ``up`` and rows of ``down`` gives a smaller rank.
    """

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        """Inner dimension k."""
        return self.up.shape[-1]

    def truncate(self, rank: int) -> Factors:
        """The ``rank`` most important directions."""
        return self if rank >= self.rank else Factors(self.up[:, :rank], self.down[:rank])


@dataclass(frozen=True)
class WeightMethod(Options, ABC):
    """A method that compresses one weight matrix at a time.

    A subclass says in `weight_of_inputs` which inputs matter to it, and inherits the best low-rank
    approximation under that weight; one with another objective overrides `factorize`.

    Attributes:
        needs: statistics from `eckart.models.calibrate.NEEDS` that must be gathered; none if data-free.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def gathers(self) -> frozenset[str]:
        """What this instance needs: `needs`, and more where an option asks for it."""
        return self.needs

    @property
    def surveys(self) -> frozenset[str]:
        """What `spectrum` needs from the dense model, when a budget is shared by value."""
        return self.gathers

    @property
    def sequential(self) -> bool:
        """Whether a layer's statistics depend on the layers before it being compressed already."""
        return bool(self.gathers & SEQUENTIAL)

    @abstractmethod
    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """G (n, n), or its diagonal (n,), in the objective tr((W - B) G (W - B)^T); None for the identity."""

    def spectrum(self, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """(min(m, n),) what each further rank is worth to this method, for budgets shared by layers."""
        # In float64: what is below 1e-3 of the largest value would be noise in float32, and the budget is shared by it.
        return weighted_svd(weight, self.weight_of_inputs(statistics), rank=1, double=True).s

    def factorize(self, weight: torch.Tensor, statistics: Statistics, rank: int) -> Factors:
        """Factors of ``weight`` (m, n) of the given rank."""
        best = weighted_svd(weight, self.weight_of_inputs(statistics), rank)
        return Factors(best.basis, best.basis.mT @ weight.to(best.basis.dtype))
