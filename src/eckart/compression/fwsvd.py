"""FWSVD: truncated SVD of a weight whose inputs count by their Fisher information for the task.

    min sum_j f_j ||(W - B)_:j||^2,  f_j = sum_b sum_i (dL_b / dW_ij)^2          W (m, n), f (n,)

Y.-C. Hsu et al., Language model compression with weighted low-rank factorization, ICLR 2022, arXiv
2207.00112; no official code. The gradient of each sequence is squared on its own (public
reimplementations square the batch's mean gradient, which has another pattern), and f weights the
INPUT features, the columns of a torch weight. Compress after fine-tuning on the task, with its loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..models.calibrate import Statistics
from .contract import WeightMethod

__all__ = ["FWSVD"]


@dataclass(frozen=True)
class FWSVD(WeightMethod):
    """Fisher-weighted SVD.

    Attributes:
        epsilon: added to f relative to its mean, so that an input the task never used does not lose
            its weights altogether; 1e-6.

    Example:
        >>> import torch
        >>> weight = torch.diag(torch.tensor([3.0, 2.0]))
        >>> needed = Statistics(fisher=torch.tensor([0.0, 1.0]))
        >>> factors = FWSVD().factorize(weight, needed, rank=1)
        >>> torch.allclose(factors.up @ factors.down, torch.diag(torch.tensor([0.0, 2.0])), atol=1e-3)
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a positive number, not {self.epsilon}; the default is 1e-6")

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """f (n,) with a floor; None where the loss never touched the layer."""
        information = statistics.require("fisher")
        mean = information.mean()
        return information + self.epsilon * mean if float(mean) > 0 else None
