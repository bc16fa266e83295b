"""Truncated singular value decomposition: the best rank-k copy of a weight, blind to what flows through it.

    W_k = argmin over rank(B) <= k of ||W - B||_F = U_k diag(s_k) V_k^T          W (m, n)

C. Eckart and G. Young, The approximation of one matrix by another of lower rank, Psychometrika 1(3),
1936. The baseline that every other method has to beat. No data needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.calibrate import Statistics
from .contract import WeightMethod

__all__ = ["SVD"]


@dataclass(frozen=True)
class SVD(WeightMethod):
    """Plain truncated SVD of each weight; it has no options.

    Example:
        >>> import torch
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> factors = SVD().factorize(weight, Statistics(), rank=2)
        >>> torch.allclose(factors.up @ factors.down, torch.diag(torch.tensor([3.0, 2.0, 0.0])))
        True
    """

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """None: every input direction counts the same."""
        return None
