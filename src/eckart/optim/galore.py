"""GaLore: Adam's moments of the gradient's projection on its leading singular vectors, weights dense and all trained.

    R = G Q (m, r),   W ← W - lr · scale · N(R) Qᵀ,   Q (n, r) leading right singular vectors of G,  m ≥ n

    (for m < n the left ones, R = Pᵀ G)

J. Zhao, Z. Zhang, B. Chen, Z. Wang, A. Anandkumar, Y. Tian, "GaLore: Memory-Efficient LLM Training by Gradient
Low-Rank Projection", 2024, arXiv:2403.03507. Code: github.com/jiaweizzhao/GaLore.

What differs. The official code takes a full decomposition every 200 steps, in which a matrix of 2048 stalls for half a
minute on a processor; here one step of orthogonal iteration improves the basis that is there (``refresh="warm"``), at
about the cost of a further projection, and the layers take turns (``stagger``). ``refresh="svd"`` is the paper's. The
step follows torch's AdamW: ε is added to the corrected root, decay comes first. A projection of both sides ("full" in
the code) and of tensors with more axes are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from .contract import ProjectedMethod, Step
from .moments import State
from .optimizer import ProjectedOptimizer
from .projection import carry_moments, exact_basis, improved_basis
from .sharding import right_product

__all__ = ["GaLore", "GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreLion", "GaLoreSGD"]

Refresh = Literal["warm", "svd"]


@dataclass(frozen=True)
class GaLore(ProjectedMethod):
    """The options of GaLore.

    Args:
        update_interval: Updates between two refreshes of the basis; 200 in the paper, 500 at 7B.
        refresh: "warm" for orthogonal iteration from the basis that is there, "svd" for a full decomposition.
        iterations: Of "warm", a product with G and one with Gᵀ each; ours.
        stagger: Whether the matrices are refreshed in different steps; ours.
        carry: Whether the moments are expressed in the new basis at a refresh; the paper leaves them as they are.
    """

    update_interval: int = 200
    refresh: Refresh = "warm"
    iterations: int = 1
    stagger: bool = True
    carry: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(update_interval=self.update_interval, iterations=self.iterations)
        self.check_choices(refresh=Refresh)

    def project(self, a: Tensor, state: State, step: Step) -> Tensor:
        """Refreshes Q when it is due."""
        basis = state["basis"]
        if not step.due(self.update_interval, stagger=self.stagger):
            return right_product(a, basis)
        fresh, low = self.fresh_basis(a, None if step.number == 1 else basis, step)
        if self.carry and step.number > 1:
            carry_moments(state, basis, fresh)
        basis.copy_(fresh)
        return low

    def fresh_basis(self, a: Tensor, start: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """Q (b, r) and R = A Q.

        Args:
            a: A (a, b).
            start: The basis that is there, or None.
            step: Where the parameter is in its training.
        """
        assert self.rank is not None
        if self.refresh == "svd":
            return exact_basis(a, self.rank)
        return improved_basis(a, start, self.rank, step.generator(a.device), iterations=self.iterations)


class GaLoreAdamW(ProjectedOptimizer):
    """AdamW on projected gradients. Options as `GaLore` and `ProjectedOptimizer`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(8, 6))
        >>> optimizer = GaLoreAdamW([weight], lr=0.1, rank=2)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['basis', 'first', 'second', 'step']
    """

    method: ClassVar[type[GaLore]] = GaLore
    options: ClassVar[dict[str, Any]] = {}


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with moments of eight bits."""

    options: ClassVar[dict[str, Any]] = {"bits": 8}


class GaLoreAdafactor(GaLoreAdamW):
    """`GaLoreAdamW` with a factored second moment."""

    options: ClassVar[dict[str, Any]] = {"rule": "adafactor"}


class GaLoreLion(GaLoreAdamW):
    """Lion on projected gradients; the sign is taken of the projection, before lifting."""

    options: ClassVar[dict[str, Any]] = {"rule": "lion", "betas": (0.9, 0.99)}


class GaLoreSGD(GaLoreAdamW):
    """Gradient descent with momentum on projected gradients."""

    options: ClassVar[dict[str, Any]] = {"rule": "sgd"}
