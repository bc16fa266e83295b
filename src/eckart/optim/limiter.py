"""How fast the norm of an update may grow from one step to the next.

    X ← X min(1, γ s / ‖X‖),   s ← ‖X‖ after that

X. Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", 2024, arXiv:2410.01623.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_gamma", "growth_factor"]

_ABSENT = 1e-3  # share of its usual size below which an update says nothing about the next one
_EPS = 1e-8  # the papers'


def check_gamma(gamma: float | None) -> None:
    """Refuse a limit that no update could keep.

    Raises:
        ValueError: It is below 1.
    """
    if gamma is not None and not gamma >= 1:
        raise ValueError(f"gamma must be at least 1, or None for no limit, not {gamma}")


def growth_factor(size: Tensor, previous: Tensor, gamma: float, usual: Tensor | float) -> Tensor:
    """min(1, γ s / ‖X‖), a scalar; sets s to the norm that X has after it.

    The paper does not limit the first step. Nor is X limited here after a step in which there was next to none of it,
    for a gradient of zeros or of rank r: growth from rounding errors by γ a step would hold it down for hundreds of
    steps.

    Args:
        size: ‖X‖, a scalar.
        previous: s, a scalar, 0 before the first step; changed in place.
        gamma: γ, at least 1.
        usual: What ‖X‖ is compared with to tell whether there was any.

    Example:
        >>> s = torch.zeros(())
        >>> [round(float(growth_factor(torch.tensor(size), s, 1.01, 1.0)), 3) for size in (0.0, 2.0, 4.0, 1.0)]
        [1.0, 1.0, 0.505, 1.0]
        >>> float(s)
        1.0
    """
    allowed = gamma * (previous + _EPS)
    free = (previous <= _ABSENT * usual) | (size <= allowed)
    factor = torch.where(free, torch.ones_like(size), allowed / size)
    previous.copy_(size * factor)
    return factor
