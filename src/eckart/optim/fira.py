"""Fira: GaLore's update, and the gradient outside of its subspace at the step size that Adam takes within.

    S = A - R Qᵀ (a, b),   S ← diag(k) S,   kᵢ = ‖Nᵢ‖ / ‖Rᵢ‖,   S ← S min(1, γ s / ‖S‖),   D = scale · (N Qᵀ + S)

A = G or Gᵀ, R = A Q and N (a, r) are GaLore's; Rᵢ and Nᵢ are rows, one for each index of the axis that is not
projected; s is the norm of S in the step before. The update has full rank, the state one number more than GaLore's.

X. Chen, K. Feng, C. Li, X. Lai, X. Yue, Y. Yuan, G. Wang, "Fira: Can We Achieve Full-rank Training of LLMs Under
Low-rank Constraint?", 2024, arXiv:2410.01623. Code: github.com/xichen-fy/Fira.

What differs. The official code takes G - scale · R Qᵀ for the residual and does not scale it: at 0.25 it steps four
times as far outside, with three quarters of R Qᵀ on top (``residual="reference"``). Its limiter also sees the update
before bias correction; Algorithm 1 corrects N at once, and so it is here. After a step without a residual to speak of
the limiter starts anew (see `eckart.optim.limiter`). The subspace is found as in `eckart.optim.galore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .contract import Step
from .galore import GaLore
from .limiter import check_gamma, growth_factor
from .moments import State
from .optimizer import ProjectedOptimizer
from .sharding import from_local, local, whole_norm

__all__ = ["Fira", "FiraAdamW", "FiraAdamW8bit"]

Norm = Literal["column", "matrix"]
Residual = Literal["paper", "reference"]

_EPS = 1e-8  # the paper's


@dataclass(frozen=True)
class Fira(GaLore):
    """The options of Fira, after those of `GaLore`.

    Args:
        norm: Whether k is a number for each "column" along the axis that is not projected, or one for the "matrix".
        residual: "paper" for A - R Qᵀ, scaled as all of the update, "reference" for A - scale · R Qᵀ, not scaled.
        gamma: γ, by which the norm of the residual may grow in a step; None for no limit.
    """

    norm: Norm = "column"
    residual: Residual = "paper"
    gamma: float | None = 1.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(norm=Norm, residual=Residual)
        check_gamma(self.gamma)

    def allocate(self, like: Tensor) -> State:
        """GaLore's, and the norm of the residual."""
        return {**super().allocate(like), "outside": local(like).new_zeros(())}

    def combine(self, a: Tensor, low: Tensor, n: Tensor, state: State, step: Step) -> Tensor:
        """N Qᵀ and the scaled, limited residual."""
        paper = self.residual == "paper"
        outside = self.lift(low, a, state).mul_(-1 if paper else -self.scale).add_(a)
        outside.mul_(self.step_sizes(low, n))
        if self.gamma is not None:
            outside.mul_(growth_factor(whole_norm(outside), state["outside"], self.gamma, usual=whole_norm(n)))
        inside = self.lift(n, a, state)
        return outside.add_(inside).mul_(self.scale) if paper else outside.add_(inside, alpha=self.scale)

    def step_sizes(self, low: Tensor, n: Tensor) -> Tensor:
        """k: (a, 1) and its rows placed as those of R, or a scalar."""
        if self.norm == "matrix":
            return whole_norm(n) / (whole_norm(low) + _EPS)
        after, before = (torch.linalg.vector_norm(local(x), dim=1, keepdim=True) for x in (n, low))
        return from_local(after / (before + _EPS), n, shape=(n.shape[0], 1))


class FiraAdamW(ProjectedOptimizer):
    """AdamW on projected gradients, with the rest of the gradient. Options as `Fira` and `ProjectedOptimizer`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(8, 6))
        >>> optimizer = FiraAdamW([weight], lr=0.1, rank=2)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['basis', 'first', 'outside', 'second', 'step']
    """

    method: ClassVar[type[Fira]] = Fira
    options: ClassVar[dict[str, Any]] = {}


class FiraAdamW8bit(FiraAdamW):
    """`FiraAdamW` with moments of eight bits."""

    options: ClassVar[dict[str, Any]] = {"bits": 8}
