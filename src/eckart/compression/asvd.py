"""ASVD: truncated SVD of a weight whose columns are scaled by the size of the activations they meet.

    min ||(W - B) D||_F,  D = diag(mean|x|^alpha)          W (m, n), x (n,)

Z. Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language
Models, 2023, arXiv 2312.05821; code: hahnyuan/ASVD4LLM. We keep its scaling and leave out its search
for a rank per layer (`allocation` does that for every method). It is the diagonal shadow of SVD-LLM,
kept as a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..models.calibrate import Statistics
from .contract import WeightMethod

__all__ = ["ASVD"]


@dataclass(frozen=True)
class ASVD(WeightMethod):
    """Activation-aware scaling.

    Attributes:
        alpha: exponent of the mean absolute activation; 0.5 in the paper, 0 gives the plain SVD.

    Example:
        >>> import torch
        >>> weight = torch.diag(torch.tensor([3.0, 2.0]))
        >>> loud = Statistics(absmean=torch.tensor([1.0, 100.0]))
        >>> factors = ASVD(alpha=1.0).factorize(weight, loud, rank=1)
        >>> torch.allclose(factors.up @ factors.down, torch.diag(torch.tensor([0.0, 2.0])), atol=1e-5)
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"absmean"})

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 2:
            raise ValueError(f"alpha must lie in [0, 2], not {self.alpha}; the paper uses 0.5")

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """The squared scaling, (n,); silent inputs get the smallest scale of the others, not zero."""
        size = statistics.require("absmean")
        heard = size > 0
        if not bool(heard.any()):
            return None
        return size.where(heard, size[heard].min()).pow(2 * self.alpha)
